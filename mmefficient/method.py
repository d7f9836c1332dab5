"""What all methods share, whatever they change."""

from __future__ import annotations

from dataclasses import dataclass, fields
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, ClassVar

from mmefficient.decisions import TowerLayer
from mmefficient.fields import check_fields

if TYPE_CHECKING:
    from mmefficient.profiles import Checkpoint


def about(help: str, quiet: bool = False, prose: bool = False) -> dict[str, Any]:
    """Metadata of a method's field; the text is shown by `mmefficient methods` and the demo.

    Args:
        quiet: a plan's text leaves the field out while it has its default.
        prose: the field is a text to be read; other texts may name files and models.
    """
    return {"help": help, "quiet": quiet, "prose": prose}


SHARED = about(
    "what shares a budget: 'image', 'tile' (a crop, or a frame), 'frame' (of a video) or 'prompt'", quiet=True
)
"""Metadata of the field `scope` of a reducer, by which a plan chooses (see `budgets.Scope`)."""


@dataclass(frozen=True)
class Method:
    """What all methods share: a frozen dataclass whose fields are its settings.

    Attributes:
        name: as plans write it; point: which extension point it fills; paper: link; summary: one line for lists.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    point: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    many_turns: ClassVar[bool] = True
    """Whether visual rows, and which of them stay, are the same for every question, so that later turns on one cache
    miss nothing, and other questions can use it."""
    tower_layers: ClassVar[tuple[TowerLayer, ...]] = ()
    """Layers of the tower that the method reads besides the one whose output is used; may be a property."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        given = [(f, getattr(self, f.name)) for f in fields(self)]
        shown = [f"{f.name}={_text(v)}" for f, v in given if not (f.metadata.get("quiet") and v == f.default)]
        return f"{self.name}({','.join(shown)})"

    @property
    def watches(self) -> bool:
        """Whether the method must see every encoding of an image, not only its result."""
        return bool(self.needs & {"tower", "match", "mark"})

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        """What carries the method out on a model, each with its own site; most methods are their own.

        A method that acts in several layers, or whose layer or parameters depend on the checkpoint, gives others. Their
        class names begin with an underscore, which keeps them from being methods of their own.
        """
        return (self,)


def _text(value: object) -> str:
    """A field's value as a plan's text has it: names stand for themselves, other strings are quoted."""
    name = isinstance(value, str) and value.isidentifier() and not iskeyword(value)
    return repr(value) if isinstance(value, str) and not name else str(value)
