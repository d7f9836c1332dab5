"""Finds methods: the modules in this package's folders, and entry points in the group `mmefficient.methods`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from mmefficient.errors import PlanError, UnknownMethodError
from mmefficient.points import Method


@cache
def _registry() -> dict[str, type[Method]]:
    """Every method by name; built on first use, so that importing the package imports no method."""
    found: dict[str, type[Method]] = {}
    for folder in pkgutil.iter_modules(__path__, f"{__name__}."):
        package = importlib.import_module(folder.name)
        for module in pkgutil.iter_modules(package.__path__, f"{folder.name}."):
            for value in vars(importlib.import_module(module.name)).values():
                own = isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.name
                if own and not value.__name__.startswith("_"):  # stages of a method are none themselves
                    found[value.name] = value
    for entry in entry_points(group="mmefficient.methods"):
        method = entry.load()
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise PlanError(f"entry point {entry.name} ({entry.value}) is not a method class; uninstall or fix it.")
        if method.name in found:
            raise PlanError(f"entry point {entry.name} ({entry.value}) takes the name {method.name}, which is in use.")
        found[method.name] = method
    return found


def methods() -> list[type[Method]]:
    """All method classes, by name."""
    return [method for _, method in sorted(_registry().items())]


def method(name: str) -> type[Method]:
    """The method class called `name`.

    Raises:
        UnknownMethodError: there is none; suggests the nearest name.
    """
    known = _registry()
    if name not in known:
        raise UnknownMethodError(f"there is no method {name!r}; {suggest(name, known)}")
    return known[name]


def suggest(name: str, known: object) -> str:
    """Half a sentence that helps after a typo."""
    names = sorted(known)  # type: ignore[call-overload]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}."


class _Methods(ModuleType):
    """Importing this package binds it over the public function `mmefficient.methods`; so it can be called."""

    def __call__(self) -> list[type[Method]]:
        return methods()


sys.modules[__name__].__class__ = _Methods
