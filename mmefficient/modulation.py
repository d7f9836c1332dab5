"""The Modulation point: what a method changes about the attention of a decoder layer, and what it decides by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from mmefficient.errors import PlanError
from mmefficient.points import Method
from mmefficient.tokens import Role, TokenMap

if TYPE_CHECKING:
    from mmefficient.vision import Tower

GROUPING = frozenset({"map", "mix"})
Rows = Literal["all", "answer", "last"]
Gain = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LayerPrompt:
    """One prompt in one decoder layer: B rows of the batch, n slots each. No tensor here is [n, n].

    Behind a row's last token there may be slots of text that nothing sees: drafts, or what fills up a recorded program.

    Attributes:
        layer: index of the decoder layer.
        tokens: the token map of the slots; role PAD where a slot takes no part.
        query, key, value: [B, Hq, n, d], and [B, Hkv, n, d] twice, rotary positions applied.
        scale: factor on the logits.
        hidden: residual stream entering the layer, [B, n, D]; present when "hidden" is in `Modulation.needs`.
        heads, blind: output of every head in the last prompt row, before the output projection, float32 [B, Hq, d]:
            as it is, and for the same prompt without its visual tokens. Present when "blind" is in `needs`.
        tail: bool [B, n], such slots; None = there are none.
        tower: facts per tower patch; `tokens.source` says which patch a visual token is. Present when "tower" is in
            `needs`.
    """

    layer: int
    tokens: TokenMap
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    hidden: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    tower: Tower | None = None
    tail: torch.Tensor | None = None

    @property
    def has_image(self) -> torch.Tensor:
        """bool [B]: whether the row holds a visual token in this layer."""
        return self.tokens.visual.any(1)


@dataclass(frozen=True, eq=False)
class Mix:
    """New masses of the key groups under the softmax; each group keeps its own distribution. See `kernels.group_mix`.

    Attributes:
        where: bool [B, Hq or 1], the heads it may act in.
        move: float32 [groups, groups], the new masses are move @ masses.
        least: float32 [conditions, groups + 1]: it acts in rows in which the masses times least[:, :-1] reach
            least[:, -1].
    """

    where: torch.Tensor
    move: torch.Tensor
    least: torch.Tensor

    @classmethod
    def of(cls, where: torch.Tensor, move: Sequence[Sequence[float]], least: Sequence[Sequence[float]]) -> Mix:
        """With the numbers as they are written."""
        return cls(where, torch.tensor(move, device=where.device), torch.tensor(least, device=where.device))


@dataclass(frozen=True, eq=False)
class Change:
    """What a modulation does in one layer; every default is the identity. B, Hq and n as in `LayerPrompt`.

    Attributes:
        bias: added to the logits of every key, broadcastable to [B, Hq, n]; keys that come later get 0.
        logit_map: (a, b, c) per head and key group, float32 [3, B or 1, Hq or 1, groups]: a logit s becomes
            a * s + b * |s| + c.
        mix: how attention moves between key groups.
        gain: factor on each head's output: [B, Hq], or a function of the rows' queries [B, Hq, R, d] that gives
            [B, Hq, R].
        blind_too: the gain also acts on the prompt without its visual tokens (see `LayerPrompt.blind`).

    A gain that is a function holds its tensors as arguments of a `functools.partial`: there they are found when the
    change is stored.
    """

    bias: torch.Tensor | None = None
    logit_map: torch.Tensor | None = None
    mix: Mix | None = None
    gain: Gain | None = None
    blind_too: bool = False


@dataclass(frozen=True)
class Modulation(Method):
    """Key bias, group mix, logit map, head gain, per layer, head and row. Identity: a `Change` with its defaults.

    A method sets the class variables and overrides `change`, and `group` if it treats keys by group. It is asked once
    per prompt and layer; decoding goes on with what it said then. In a plan biases add up, gains multiply, and at most
    one method groups the keys of a layer.
    """

    point: ClassVar[str] = "modulation"
    changes: ClassVar[frozenset[str]]
    """Which of "bias", "map", "mix" and "gain" the method's `Change` may hold."""
    rows: ClassVar[Rows]
    """Prompt rows it acts on: "all", those after the last visual token ("answer"), or the one that predicts the
    answer's first token ("last"). It acts on every row of later calls, but for "last", which in later turns again means
    the rows that predict a token."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Any of "hidden", "blind", "tower"."""
    groups: ClassVar[int] = 1
    """Key groups, 1 to 4; group 0 holds everything that comes later, unless `later` says otherwise."""
    later: ClassVar[int] = 0
    many_turns: ClassVar[bool] = False  # it is asked about whole prompts
    per_layer: ClassVar[bool] = False
    """Whether `group` differs from layer to layer, even where the layers hold the same tokens."""
    per_head: ClassVar[bool] = False
    """Whether every head has groups of its own: then `group` gives [B, Hq, n], and heads run as rows of a batch."""
    recordable: ClassVar[bool] = True
    """Whether the method can be part of a recorded program: it does not wait for the device, and what it does depends
    on the prompt through the values of tensors alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = getattr(self, "first", 0), getattr(self, "last", -1)
        if first < 0 or (last >= 0 and last < first):
            raise PlanError(f"{self.name}: first={first}, last={last} is no range of layers; last=-1 is the last one.")

    def layers(self, count: int) -> Sequence[int]:
        """The decoder layers it acts in, for a model of `count`; by default from `first` to `last`, -1 = the last."""
        first, last = getattr(self, "first", 0), getattr(self, "last", -1)
        return range(first, count if last < 0 else last + 1)

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        """The group of every slot, integer [B, n] (or [B, Hq, n], see `per_head`) in 0..groups-1."""
        raise NotImplementedError(f"{type(self).__name__} changes maps or mixes but does not override group")

    def change(self, prompt: LayerPrompt) -> Change:
        """What to do in this layer."""
        raise NotImplementedError(f"{type(self).__name__} does not override change")


def by_layer(methods: Sequence[Modulation], count: int) -> dict[int, tuple[Modulation, ...]]:
    """What acts in each of `count` decoder layers, in the order of the plan.

    Raises:
        PlanError: a layer is out of range, or two methods group the keys of one layer, each in its own way.
    """
    found: dict[int, tuple[Modulation, ...]] = {}
    for method in methods:
        chosen = method.layers(count)
        if not chosen or max(chosen) >= count:
            raise PlanError(f"{method} acts in layers out of range; the model has layers 0 to {count - 1}.")
        for layer in chosen:
            for other in found.get(layer, ()):
                if GROUPING & method.changes and GROUPING & other.changes:
                    raise PlanError(
                        f"{other.name} and {method.name} both divide the keys of layer {layer} into groups; a layer "
                        "takes one, so give them different layers or leave one out."
                    )
            found[layer] = (*found.get(layer, ()), method)
    return found


def answering(tokens: TokenMap) -> torch.Tensor:
    """bool [B, n]: text after a row's last visual token; none in rows without any."""
    seen = (tokens.role == Role.IMAGE) | (tokens.role == Role.SEPARATOR)
    after = seen.flip(1).long().cumsum(1).flip(1) == 0
    return after & seen.any(1, keepdim=True) & (tokens.role == Role.QUESTION)
