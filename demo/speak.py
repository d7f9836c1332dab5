"""Errors as the browser may see them: our own sentences, and for anything else one that tells nothing."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from mmefficient.errors import MMEfficientError

LOG = logging.getLogger("mmefficient.demo")


@contextmanager
def _spoken() -> Iterator[None]:
    try:
        yield
    except MMEfficientError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        LOG.exception("an action of the demo failed")
        raise gr.Error("The demo failed at this; its log says why.", print_exception=False) from error


def spoken(action: Callable[..., Any]) -> Callable[..., Any]:
    """`action`, a function or a generator function, with its errors turned into `gr.Error`s that hold one sentence."""
    if inspect.isgeneratorfunction(action):

        @functools.wraps(action)
        def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _spoken():
                yield from action(*args, **kwargs)

        return generator

    @functools.wraps(action)
    def function(*args: Any, **kwargs: Any) -> Any:
        with _spoken():
            return action(*args, **kwargs)

    return function
