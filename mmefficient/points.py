"""Extension points: what a method may change. What it decides by (`decisions`, `budgets`) can be had from here too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import nn

from mmefficient.budgets import Scope, Unit, at_depths, check_budget, resolve_budget
from mmefficient.decisions import (
    LayerTokens,
    MatchTokens,
    OwnHeads,
    QuestionTokens,
    Selection,
    TowerLayer,
    TowerTokens,
    VisualTokens,
    order_selection,
    select_top,
)
from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter
    from mmefficient.profiles import Checkpoint
    from mmefficient.tokens import TokenMap

__all__ = [
    "EVERYTHING",
    "KEYS",
    "SHARED",
    "LayerMethod",
    "LayerTokens",
    "Layers",
    "MatchTokens",
    "Method",
    "OwnHeads",
    "Pattern",
    "Positions",
    "QuestionTokens",
    "Reducer",
    "RowPolicy",
    "Scope",
    "Selection",
    "TowerLayer",
    "TowerTokens",
    "Unit",
    "VisualTokens",
    "VisualWork",
    "about",
    "at_depths",
    "check_budget",
    "order_selection",
    "resolve_budget",
    "select_top",
]

KEYS: Literal["keys"] = "keys"
"""Among the scores of a layer, the sizes of its keys."""

Positions = Literal["keep", "compact"]
Layers = Literal["all"] | tuple[int, ...]


def about(help: str, quiet: bool = False) -> dict[str, Any]:
    """Metadata of a method's field; the text is shown by `mmefficient methods` and the demo.

    Args:
        quiet: a plan's text leaves the field out while it has its default.
    """
    return {"help": help, "quiet": quiet}


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
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, f.name, tuple(value))
            if f.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, int)):
                raise PlanError(f"{self.name}: {f.name}={value!r} is not a whole number.")

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


@dataclass(frozen=True)
class Reducer(Method):
    """Which visual tokens exist from a site on. Identity: keep all.

    A method is a frozen dataclass that sets the class variables and overrides `score` (rank, keep the best) or `reduce`
    (anything else, such as merging). Gathering, positions, ragged batches, caches and accounting are done for it.
    """

    point: ClassVar[str] = "reducer"
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the method asks for: see `VisualTokens`; "full_grid": every view of a unit is a complete grid."""
    adaptive: ClassVar[bool] = False
    """Whether budgets depend on what the tokens hold (`choose`), which costs one wait for the device."""
    weighted: ClassVar[bool] = False
    """Whether keys count by their size from the site on, also for later tokens (log of the size on their logits)."""
    shared_by: ClassVar[Scope] = "image"
    """What shares a budget, for methods without a field `scope`."""
    space: ClassVar[Literal["lm", "tower"]] = "lm"
    """Whose features `Selection.mix` mixes; tower features go through the projector afterwards."""
    class_token: ClassVar[str] = ""
    """What stands in for the tower's CLS token where there is none; empty: the method does without one everywhere."""

    @property
    def scope(self) -> Scope:
        """What shares a budget; methods whose rule holds for any pool of tokens have a field of this name instead."""
        return self.shared_by

    @property
    def site(self) -> int:
        """Decoder layer at whose input the reducer acts; 0 = input of the language model."""
        return getattr(self, "layer", 0)

    @property
    def staged(self) -> bool:
        """Whether only `stages` knows the sites."""
        return type(self).stages is not Method.stages

    @property
    def thins(self) -> bool:
        """Whether the method makes the vision tower give fewer tokens (`attach`), so that nothing else can ask it."""
        return False

    def attach(self, adapter: Adapter) -> list[Callable[[], Any]]:
        """Change how the vision tower runs while the plan is applied (`tower.Thinning`); returns what undoes it."""
        return []

    @property
    def position_policy(self) -> Positions:
        """'keep': surviving tokens keep their position ids. 'compact': ids close up, later text included."""
        return getattr(self, "positions", "keep")

    def __post_init__(self) -> None:
        if self.position_policy not in ("keep", "compact"):
            raise PlanError(f"{self.name}: positions={self.position_policy!r} is neither 'keep' nor 'compact'.")
        if self.scope not in get_args(Scope):
            raise PlanError(f"{self.name}: scope={self.scope!r} is none of {', '.join(get_args(Scope))}.")
        super().__post_init__()
        if self.site < 0:
            raise PlanError(f"{self.name}: layer={self.site} is not a layer number; count from 0.")
        if (keep := getattr(self, "keep", None)) is not None:
            check_budget(f"{self.name}: keep", keep)

    def raters(self, tokens: VisualTokens) -> torch.Tensor:
        """bool [U, Q]: whose attention `VisualTokens.attention` is ("question_attention"); identity: all question rows.

        Args:
            tokens: the prompt at the language model's input, one unit per row, with `question`.
        """
        assert tokens.question is not None
        return tokens.question.valid

    def budget(self, unit: Unit) -> int:
        """How many tokens of `unit` stay.

        Raises:
            BudgetError: more than the unit holds.
        """
        return resolve_budget(self.keep, unit)  # type: ignore[attr-defined]

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        """What stays of every unit, and how many; only asked of `adaptive` methods, others have `budget`."""
        raise NotImplementedError(f"{type(self).__name__} is adaptive but does not override choose")

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        """[U, N], higher stays."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither score nor reduce")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        """Choose `counts[u]` tokens of every unit u."""
        return select_top(self.score(tokens), tokens.valid, counts)


def _text(value: object) -> str:
    """A field's value as a plan's text has it: names stand for themselves, other strings are quoted."""
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


@dataclass(frozen=True)
class VisualWork:
    """What one layer computes for the rows of visual tokens; their keys it computes in any case.

    Attributes:
        attention: "full" = like every row; "self" = each attends to itself with weight 1, so that no query is needed
            and the update is W_O W_V LN(x); "nothing" = no update by attention.
        ffn: share of the FFN's inner width that they pass through: 1 = all, 0 = no FFN.
        extra: multiply-accumulates per row that a method adds.
        values: whether they give values; without, who sees their keys reads zeros there.
    """

    attention: Literal["full", "self", "nothing"] = "full"
    ffn: float = 1.0
    extra: int = 0
    values: bool = True

    def __and__(self, other: VisualWork) -> VisualWork:
        """The less of both."""
        order = ("nothing", "self", "full")
        least = min(self.attention, other.attention, key=order.index)
        extra, values = self.extra + other.extra, self.values and other.values
        return VisualWork(least, min(self.ffn, other.ffn), extra, values)


EVERYTHING = VisualWork()


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that acts within chosen decoder layers: its field `layers` is "all" or a tuple of layer numbers."""

    counts: ClassVar[bool] = False
    """Whether `layers` may also be a number of layers, which `stages` resolves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers: Any = getattr(self, "layers", "all")
        if layers == "all" or (self.counts and isinstance(layers, int) and not isinstance(layers, bool) and layers > 0):
            return
        whole = isinstance(layers, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
        if not whole or not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise PlanError(
                f"{self.name}: layers={layers!r} is neither 'all' nor a tuple of layers such as (8, 9, 10)."
            )

    def acts(self, layer: int) -> bool:
        """Whether `layer` is one of the chosen."""
        layers: Layers = getattr(self, "layers", "all")
        return layers == "all" or layer in layers

    @property
    def last(self) -> int:
        """The highest layer that is named; -1 = none is."""
        layers: Layers = getattr(self, "layers", "all")
        return -1 if layers == "all" else max(layers)


@dataclass(frozen=True)
class RowPolicy(LayerMethod):
    """What is computed for visual rows. Identity: everything."""

    point: ClassVar[str] = "rows"
    sources: ClassVar[bool] = False
    """Whether visual rows enter each layer anew, from `source`."""

    def work(self, layer: int) -> VisualWork:
        """Of a layer that the method acts in."""
        raise NotImplementedError(f"{type(self).__name__} does not override work")

    def source(self, layer: int, base: nn.Module, projector: nn.Module) -> nn.Module:
        """What maps the projector's input [M, Dv] to the visual rows [M, D] that enter `layer`.

        Args:
            base: the multimodal model without a head; projector: its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override source")


@dataclass(frozen=True)
class Pattern(LayerMethod):
    """Which query-key pairs exist while a prompt is read. Identity: causal. Patterns in one layer intersect."""

    point: ClassVar[str] = "pattern"

    def pairs(self) -> Pairs:
        """The pairs in a layer that the method acts in."""
        raise NotImplementedError(f"{type(self).__name__} does not override pairs")

    def limit(self, tokens: TokenMap) -> torch.Tensor:
        """What is left of these pairs by a rule that no `Pairs` can say, bool [B, n, n] of which rows of visual tokens
        count. Costs memory by the square; identity: everything.

        Args:
            tokens: the n slots that the layer holds.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override limit")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: TokenMap, scale: float
    ) -> torch.Tensor:
        """The attention itself, for a method that no pairs describe: [B, H, n, d].

        Args:
            query, key, value: [B, H, n, d] and [B, G, n, d] twice, rotated; tokens: the n slots; scale: on the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override attend")
