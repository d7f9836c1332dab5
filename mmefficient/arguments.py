"""What a call gives to each parameter of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

_signature = cache(inspect.signature)
"""Of functions alone: a bound method would keep its model alive."""


def arguments_of(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by parameter, what its `**kwargs` take beside the others.

    Raises:
        TypeError: they do not fit the function.
    """
    if inspect.ismethod(function):
        given = _signature(function.__func__).bind(function.__self__, *args, **kwargs).arguments
        del given[next(iter(given))]
    else:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    return given | given.pop("kwargs", {})
