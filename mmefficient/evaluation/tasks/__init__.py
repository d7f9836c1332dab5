"""The evaluation tasks by name; each is a module with a `TASK`."""

from __future__ import annotations

import difflib
from importlib import import_module
from os import PathLike

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset
from mmefficient.evaluation.task import Task

NAMES = (
    "scenes",
    "hallucination",
    "easy-vqa",
    "pope",
    "chair",
    "vqav2",
    "gqa",
    "textvqa",
    "vizwiz",
    "scienceqa",
    "mme",
    "mmbench",
    "seedbench",
    "amber",
    "docvqa",
    "infovqa",
    "mmmu",
)


def get(
    task: str | Task, data: str | PathLike[str] | None = None, variant: str | None = None, *, skip_bad: bool = False
) -> Task:
    """The task called `task`, on the annotations at `data` (a folder or a hub id); a `Task` is returned as it is.

    Raises:
        InputError: there is none (the sentence suggests the nearest name) or no such variant, or the data cannot be
            used.
    """
    if isinstance(task, str) and task not in NAMES:
        near = difflib.get_close_matches(task.lower(), NAMES, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"choose one of: {', '.join(NAMES)}."
        raise InputError(f'There is no task "{task}"; {hint}')
    found = import_module(f"{__name__}.{task.replace('-', '_')}").TASK if isinstance(task, str) else task
    if isinstance(found, Dataset):
        return found.task(data, variant, skip_bad=skip_bad)
    if data is not None or variant is not None or skip_bad:
        raise InputError(f"The task {found.name} brings its own records; leave out data, variant and skip_bad.")
    assert isinstance(found, Task)
    return found
