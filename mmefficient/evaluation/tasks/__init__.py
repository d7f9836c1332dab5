"""The evaluation tasks by name; each is a module with a `TASK`."""

from __future__ import annotations

import difflib
from importlib import import_module

from mmefficient.errors import InputError
from mmefficient.evaluation.task import Task

NAMES = ("scenes",)


def get(name: str) -> Task:
    """The task called `name`.

    Raises:
        InputError: there is none; the sentence suggests the nearest name.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"choose one of: {', '.join(NAMES)}."
        raise InputError(f'There is no task "{name}"; {hint}')
    task = import_module(f"{__name__}.{name.replace('-', '_')}").TASK
    assert isinstance(task, Task)
    return task
