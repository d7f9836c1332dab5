"""Extension points: what a method may change, and what it is given to decide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from mmefficient.errors import BudgetError, PlanError
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter
    from mmefficient.profiles import Checkpoint

KEYS: Literal["keys"] = "keys"
"""Among the scores of a layer, the sizes of its keys."""

Positions = Literal["keep", "compact"]
Scope = Literal["image", "prompt", "tile"]
Layers = Literal["all"] | tuple[int, ...]


def about(help: str, quiet: bool = False) -> dict[str, Any]:
    """Metadata of a method's field; the text is shown by `mmefficient methods` and the demo.

    Args:
        quiet: a plan's text leaves the field out while it has its default.
    """
    return {"help": help, "quiet": quiet}


def check_budget(name: str, keep: float | int, least: int = 1) -> None:
    """A float is a fraction in (0, 1], an int a count of at least `least`.

    Raises:
        BudgetError: anything else.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(f"{name}={keep!r} is not a number; give a fraction such as 0.25 or a count such as 144.")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise BudgetError(f"{name}={keep} is outside (0, 1]; give a fraction such as 0.25 or a count such as 144.")
    if isinstance(keep, int) and keep < least:
        raise BudgetError(f"{name}={keep} keeps too little; give a fraction in (0, 1] or a count of at least {least}.")


def resolve_budget(keep: float | int, unit: Unit) -> int:
    """Tokens that `keep` grants to `unit`: a fraction is rounded to the nearest count, at least 1.

    Raises:
        BudgetError: a count larger than the unit; names the row.
    """
    if isinstance(keep, float):
        return max(1, int(keep * unit.count + 0.5))
    if keep > unit.count:
        raise BudgetError(f"row {unit.row} has {unit.count} visual tokens in {unit.label} but {keep} are to be kept.")
    return keep


@dataclass(frozen=True)
class Unit:
    """One pool of visual tokens that a budget applies to.

    Attributes:
        row: row of the batch.
        label: what the unit is, for messages ("image 0", "the prompt", "tile 2 of image 0").
        ordinal: number of the unit within its row.
        count: visual tokens in it now; total: in the prompt as it came.
        grids: (rows, cols) of every view in it, in prompt order; empty unless every view is a complete grid.
    """

    row: int
    label: str
    ordinal: int
    count: int
    grids: tuple[tuple[int, int], ...]
    total: int = -1

    def __post_init__(self) -> None:
        if self.total < 0:
            object.__setattr__(self, "total", self.count)


@dataclass(frozen=True)
class TowerLayer:
    """A layer of the vision tower to look into.

    Attributes:
        layer: number from 0, or from the end if negative; a float is a share of the tower's layers (0.375 of 24 is the
            ninth, number 8); None = the layer whose output the projector reads.
        rows: who asks: the CLS row (if the tower has one, else all rows), or all rows.
        joined: count all heads as one; then attention is that of one wide head, and keys hold all channels.
    """

    layer: int | float | None = None
    rows: Literal["class", "all"] = "class"
    joined: bool = False


@dataclass(frozen=True)
class LayerTokens:
    """What one tower layer knows about the visual tokens.

    Attributes:
        attention: float32 [U, N]: attention a patch receives, mean over the asking rows and over heads.
        keys: mean over heads, or all channels of them, [U, N, d].
    """

    attention: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class TowerTokens:
    """What the vision tower knows about the visual tokens; [U, N, ...] like `VisualTokens`.

    Attributes:
        features: input of the projector, [U, N, Dv].
        attention: float32 [U, N]: attention a patch receives in the layer whose output is `features`, mean over heads:
            from the CLS row if the tower has one, else mean over all rows.
        keys: keys of that layer, mean over heads, [U, N, d].
        layers: the layers in `Reducer.tower_layers`.
    """

    features: torch.Tensor
    attention: torch.Tensor
    keys: torch.Tensor
    layers: Mapping[TowerLayer, LayerTokens] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionTokens:
    """The text after the last visual token of each unit's row: Q = the longest of them.

    Attributes:
        hidden: residual stream, [U, Q, D].
        valid: bool [U, Q]; False in the unused tail. The last valid one is the prompt's last token.
        key_norm: as in `VisualTokens`.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class OwnHeads:
    """Queries and keys of the visual tokens in the layer that they are about to enter.

    Attributes:
        query: before rotation, [U, H, N, d]; key: likewise, [U, G, N, d]; rotated: keys after rotation, [U, G, N, d].
    """

    query: torch.Tensor
    key: torch.Tensor
    rotated: torch.Tensor


@dataclass(frozen=True)
class MatchTokens:
    """Visual tokens and questions in one space, as a matcher sees them.

    Attributes:
        patches: float32 [U, N, E], not normalised.
        texts: float32 [U, C, E], not normalised: the question in as many pieces as the matcher reads it in.
        valid: bool [U, C]; False where a question has fewer pieces than others.
        inverted: small products mean a good match (see `matchers.Matcher`).
    """

    patches: torch.Tensor
    texts: torch.Tensor
    valid: torch.Tensor
    inverted: bool


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens at a reducer's site, packed by unit: U units, N = the most tokens any of them holds.

    Attributes:
        units: the U units.
        hidden: residual stream entering the layer, [U, N, D]; for methods with "final_norm" in `Reducer.needs` as the
            decoder's last norm sees it, the question's likewise.
        valid: bool [U, N]; False in the unused tail of a short unit. Other tensors hold arbitrary numbers there.
        size: float32 [U, N], original tokens each one stands for.
        attention: float32 [U, N] or None: probability each token receives, mean over heads. `Reducer.needs` says from
            whom: "last_row_attention", the last prompt row in the previous layer; "own_row_attention", the same row in
            the layer about to be entered; "question_attention", the question rows that `Reducer.raters` chose in the
            previous layer, mean over them.
        tower, question, own, match: present when "tower", "question", "own_heads", "match" is in `Reducer.needs`.
        key_norm: float32 [U, N] or None: sum of the absolute values of a token's (rotated) keys in the previous layer,
            over all heads. Present when "key_norm" is in `Reducer.needs`.
        mark: bool [U, N] or None: present when "mark" is in `Reducer.needs`: the places at which a tower that gives
            fewer tokens (`Reducer.attach`) has put them; other places hold zeros.
    """

    units: tuple[Unit, ...]
    hidden: torch.Tensor
    valid: torch.Tensor
    size: torch.Tensor
    attention: torch.Tensor | None = None
    tower: TowerTokens | None = None
    question: QuestionTokens | None = None
    own: OwnHeads | None = None
    match: MatchTokens | None = None
    mark: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """A reducer's decision: K = the most tokens any unit keeps.

    Attributes:
        index: int64 [U, K], ascending places in the packed axis; a new token takes the position of its index.
        valid: bool [U, K], False in the unused tail of a short unit.
        mix: [U, K, N] or None. New token k gets the features mix[k] @ features; None = features of its index.
    """

    index: torch.Tensor
    valid: torch.Tensor
    mix: torch.Tensor | None = None


def select_top(scores: torch.Tensor, valid: torch.Tensor, counts: Sequence[int]) -> Selection:
    """The `counts[u]` highest scores of every unit, in prompt order; ties go to the earlier token.

    Args:
        scores: [U, N]; valid: bool [U, N]; counts: U counts, none larger than the unit.
    """
    ranked = scores.float().masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return order_selection(ranked, counts)


def order_selection(ranked: torch.Tensor, counts: Sequence[int]) -> Selection:
    """The first `counts[u]` entries of every row of `ranked` [U, >= max(counts)], put into prompt order."""
    most = max(counts)
    wanted = torch.tensor(counts, device=ranked.device)[:, None]
    used = torch.arange(most, device=ranked.device) < wanted
    index = ranked[:, :most].masked_fill(~used, torch.iinfo(torch.long).max).sort(dim=1).values
    return Selection(index.masked_fill(~used, 0), used)


def at_depths(name: str, given: Sequence[int], depths: Sequence[float], layers: int) -> tuple[int, ...]:
    """The layers `given`, or, if none are, published `depths` (shares of the model) as layers, each above the last.

    Raises:
        PlanError: not as many as there are depths, or not in rising order.
    """
    if given:
        if len(given) != len(depths) or sorted(set(given)) != list(given):
            raise PlanError(f"{name}: layers={tuple(given)} are not {len(depths)} layer numbers in rising order.")
        return tuple(given)
    found: list[int] = []
    for depth in depths:
        found.append(max(round(depth * layers), found[-1] + 1 if found else 1))
    return tuple(found)


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
    scope: ClassVar[Scope] = "image"
    space: ClassVar[Literal["lm", "tower"]] = "lm"
    """Whose features `Selection.mix` mixes; tower features go through the projector afterwards."""
    class_token: ClassVar[str] = ""
    """What stands in for the tower's CLS token where there is none; empty: the method does without one everywhere."""

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
    """What one layer computes for the rows of visual tokens; their keys and values it computes in any case.

    Attributes:
        attention: "full" = like every row; "self" = each attends to itself with weight 1, so that no query is needed
            and the update is W_O W_V LN(x); "nothing" = no update by attention.
        ffn: share of the FFN's inner width that they pass through: 1 = all, 0 = no FFN.
        extra: multiply-accumulates per row that a method adds.
    """

    attention: Literal["full", "self", "nothing"] = "full"
    ffn: float = 1.0
    extra: int = 0

    def __and__(self, other: VisualWork) -> VisualWork:
        """The less of both."""
        order = ("nothing", "self", "full")
        least = min(self.attention, other.attention, key=order.index)
        return VisualWork(least, min(self.ffn, other.ffn), self.extra + other.extra)


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
