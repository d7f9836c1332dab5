"""What the fields of a method may hold, told by their annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from mmefficient.errors import PlanError

if TYPE_CHECKING:
    from mmefficient.method import Method

NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
    tuple[int, ...]: "a tuple such as (8, 9)",
    tuple[float, ...]: "a tuple such as (0.5, 0.25)",
    tuple[tuple[int, int], ...]: "a tuple such as ((8, 0), (9, 3))",
}
LARGEST = 2**63
"""Above what tensors hold."""
Kinds = tuple[Any, ...]


def check_fields(method: Method) -> None:
    """Compare the fields of a dataclass with their types, lists made tuples first: JSON has none.

    Raises:
        PlanError: a value is of another type; numbers are finite and fit 64 bits, and True is none.
    """
    kind: Any = type(method)
    for name, kinds in _kinds(kind).items():
        value = as_tuple(getattr(method, name))
        object.__setattr__(method, name, value)
        if not any(_fits(value, kind) for kind in kinds):
            raise PlanError(f"{method.name}: {name}={value!r} {_is_not([_words(kind) for kind in kinds])}.")


def as_tuple(value: Any) -> Any:
    """Lists, and lists within, as tuples; anything else as it is."""
    return tuple(as_tuple(each) for each in value) if isinstance(value, (list, tuple)) else value


@cache
def _kinds(method: type[Method]) -> dict[str, Kinds]:
    """By field, the types of which a value may be any."""
    hints = get_type_hints(method)
    return {each.name: _alternatives(hints[each.name]) for each in fields(method)}


def _alternatives(kind: Any) -> Kinds:
    if get_origin(kind) in (Union, UnionType):
        found = tuple(inner for each in get_args(kind) for inner in _alternatives(each))
        return tuple(each for each in found if not (each is int and float in found))
    return tuple(Literal[each] for each in get_args(kind)) if get_origin(kind) is Literal else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value == get_args(kind)[0]
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, tuple):
            return False
        inner = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(inner) == len(value) and all(map(_fits, value, inner))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(kind: Any) -> str:
    return repr(get_args(kind)[0]) if get_origin(kind) is Literal else NAMES.get(kind, str(kind))


def _is_not(words: Sequence[str]) -> str:
    if len(words) < 3:
        return f"is neither {' nor '.join(words)}" if words[1:] else f"is not {words[0]}"
    return f"is none of {', '.join(words)}"
