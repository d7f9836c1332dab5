"""Modulations in programs: a prompt without its visual tokens beside the prompt, and what decoding goes on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.blind import Blind
from mmefficient.errors import ModelError
from mmefficient.graph.block import attention, block
from mmefficient.modulation import Change, Mix
from mmefficient.steered import KeyFacts, Part
from mmefficient.steering import Aside, Decide

ALIGNED = 16  # bytes
Steered = Mapping[int, tuple[Part, ...]]
"""By decoder layer, what modulations do to later rows."""


class BlindBlocks(Blind):
    """`Blind`, read by `block`."""

    def advance(self, layers: Any, index: int, decide: Decide | None = None) -> None:
        layer, aside = layers[index], Aside(decide, self.last)
        batch, slots = self.hidden.shape[:2]
        size = layer.self_attn.head_dim
        rows = (2, batch, len(layer.self_attn.k_proj.weight) // size, slots, size)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
            out = attention(query, keys, values, self.mask, self.mask is None, scale)
            return aside.attended(out.transpose(1, 2)).transpose(1, 2)

        start = torch.zeros(batch, dtype=torch.long, device=self.hidden.device)
        keys, values = self.hidden.new_empty(rows)
        self.hidden = block(layer, self.hidden, self.rope, keys, values, start, attend)


@dataclass(frozen=True)
class Place:
    """A tensor inside a vector of bytes, from byte `start` on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    def view(self, facts: torch.Tensor) -> torch.Tensor:
        """The tensor, of memory of `facts`."""
        return facts[self.start : self.end].view(self.dtype).view(self.shape)


class Kept:
    """What decoding goes on with, as one vector of bytes, so that one copy brings it to where a program looks.

    Args:
        plan: that made it; steered: of the prompt; room: by decoder layer, the keys there may be.

    Attributes:
        facts: uint8 [bytes]; key: with the plan, all else that a program depends on.

    Raises:
        ModelError: a change holds a function whose tensors are not the arguments of a `functools.partial`.
    """

    def __init__(self, plan: str, steered: Steered, room: Sequence[int]) -> None:
        self.plan = plan
        known: dict[tuple[int, int], Place] = {}  # layers share facts
        used, chunks = list[Place](), [torch.empty(0, dtype=torch.uint8)]
        end = 0

        def place(tensor: torch.Tensor, keys: int = 0, later: float = 0.0) -> Place:
            nonlocal end
            name = (id(tensor), keys)
            if name not in known:
                if keys:
                    tensor = F.pad(tensor, (0, keys - tensor.shape[-1]), value=later)
                known[name] = Place(end, tuple(tensor.shape), tensor.dtype)
                flat = tensor.reshape(-1).view(torch.uint8)
                chunks.append(F.pad(flat, (0, -len(flat) % ALIGNED)))
                end += len(chunks[-1])
            used.append(known[name])
            return known[name]

        self._steered: dict[int, Any] = {
            layer: tuple(
                moved(part, place, lambda fact, keys=room[layer]: place(fact.stored, keys, fact.later))  # type: ignore[misc]
                for part in parts
            )
            for layer, parts in steered.items()
        }
        self.facts = torch.cat(chunks[1:] or chunks)
        counts = tuple((layer, tuple(part.rows for part in parts)) for layer, parts in steered.items())
        self.key = (counts, tuple(used))

    def at(self, facts: torch.Tensor) -> Steered:
        """What decoding goes on with, as views of `facts`: those of this prompt, or of one with the same `key`."""

        def view(place: Place) -> torch.Tensor:
            return place.view(facts)

        return {
            layer: tuple(moved(part, view, lambda place: KeyFacts(place.view(facts))) for part in parts)
            for layer, parts in self._steered.items()
        }


def tensors(steered: Steered) -> list[torch.Tensor]:
    """All tensors of `steered`."""
    found: list[torch.Tensor] = []
    for parts in steered.values():
        for part in parts:
            moved(part, found.append, lambda fact: found.append(fact.stored))
    return found


def moved(part: Part, move: Callable[[Any], Any], move_keys: Callable[[Any], Any]) -> Any:
    """`part` with `move` done to every tensor and `move_keys` to facts per key."""
    change = part.change
    inside = {name: _moved(getattr(change, name), move) for name in ("logit_map", "mix", "gain")}
    group, bias = (fact and move_keys(fact) for fact in (part.group, part.bias))
    return replace(part, change=Change(**inside), group=group, bias=bias)


def _moved(value: Any, move: Callable[[Any], Any]) -> Any:
    if isinstance(value, (torch.Tensor, Place)):
        return move(value)
    if isinstance(value, Mix):
        return Mix(*(move(each) for each in (value.where, value.move, value.least)))
    if isinstance(value, partial):
        named = {name: _moved(each, move) for name, each in value.keywords.items()}
        return partial(value.func, *(_moved(each, move) for each in value.args), **named)
    if getattr(value, "__closure__", None):
        raise ModelError(
            f"{value.__qualname__} may hold tensors that programs do not see: make it a functools.partial of a method, "
            "with the tensors as arguments, or use engine='eager'."
        )
    return value
