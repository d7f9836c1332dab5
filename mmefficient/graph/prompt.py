"""A prompt in the shape that recorded programs take: rows start at place 0 and are filled up to one of few lengths."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mmefficient.asking import question_at
from mmefficient.packing import Units
from mmefficient.points import Scope
from mmefficient.prompt import HostFacts
from mmefficient.tokens import Role, TokenMap, build, images_of_rows
from mmefficient.vision import Vision

FIELDS = ("role", "image", "tile", "line", "source", "view", "row", "col")
"""What methods read of the map on the device."""
CHANGING = ("position", "size", "lives_until", "carried_by")
"""What they write."""


def bucket(tokens: int) -> int:
    """The number that `tokens` tokens are filled up to: steps of 16, then eight to an octave.

    From 128 on less than 1 in 9 is filling; below, 15 at most.
    """
    step = max(16, 1 << max(tokens - 1, 1).bit_length() >> 4)
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Prompt:
    """B rows of L places, all on the CPU. What only methods and reports want is made when they ask.

    Attributes:
        ids, position: int64 [B, L] and [P, B, L]; the filling behind a row's end repeats the last token.
        fill: places behind each row's end; held: bool [B, L], the others.
        kinds: for "image" and "video", bool [B, L]: the placeholders.
        where: int64 [N], flat places of the visual features, separators included, in the order of the images; if they
            are filled up as well, the rest of it points into the filling.
        visions: the images of each kind; layers: decoder layers; scopes: those that the reducers use.
    """

    ids: torch.Tensor
    position: torch.Tensor
    fill: list[int]
    held: torch.Tensor
    kinds: dict[str, torch.Tensor]
    where: torch.Tensor
    visions: Mapping[str, Vision]
    layers: int
    scopes: set[Scope]

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        position: torch.Tensor,
        placeholders: Mapping[str, int],
        visions: Mapping[str, Vision],
        layers: int,
        scopes: set[Scope],
        buckets: bool,
        visual: bool,
    ) -> Prompt:
        """Align a prompt of `generate`.

        Args:
            ids: int64 [B, S]; mask: [B, S], 0 = padding, or None; position: int64 [P, B, S]; all on the CPU.
            placeholders: token id of each kind; visions: the images of each kind that are there.
            buckets: fill up the text of the longest row to a number of `bucket`; otherwise rows only to the longest.
            visual: with `buckets`, fill up all of it, visual tokens included.

        Raises:
            InputError: the images do not fill the placeholders of a row; names the row.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = real.sum(1)
        length = int(counts.max())
        if buckets and visual:
            length = bucket(length + 1)  # at least one place of filling
        elif buckets:
            seen = torch.stack([(ids == token) & real for token in placeholders.values()]).any(0).sum(1)
            text = length - int(seen[counts.argmax()])
            length += bucket(text) - text
        place = torch.arange(length)
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        source = order.gather(1, torch.minimum(place, counts[:, None] - 1))
        ids = ids.gather(1, source)
        held = place < counts[:, None]
        kinds = {kind: (ids == token) & held for kind, token in placeholders.items()}
        for kind, vision in visions.items():
            images_of_rows(kinds[kind].sum(1).tolist(), [len(layout) for layout in vision.layouts], kind)
        where = torch.cat([*(kinds[kind].flatten().nonzero()[:, 0] for kind in visions), counts.new_zeros(0)])
        if buckets and visual and len(where):
            row = int(counts.argmax())
            where = torch.cat([where, where.new_full((bucket(len(where)) - len(where),), (row + 1) * length - 1)])
        return cls(
            ids,
            position.gather(2, source.expand(len(position), -1, -1)),
            (length - counts).tolist(),
            held,
            kinds,
            where,
            visions,
            layers,
            scopes,
        )

    @cached_property
    def tokens(self) -> TokenMap:
        """The map; the filling is padding."""
        layouts = {kind: vision.layouts for kind, vision in self.visions.items()}
        strides = {kind: vision.strides for kind, vision in self.visions.items()}
        return build(self.kinds, layouts, self.held, self.position, self.layers, strides, {})

    @cached_property
    def facts(self) -> HostFacts:
        """Facts of the prompt with the filling taken for text, which it is to a program: it is behind everything, so
        nothing sees it, and it never leaves."""
        role = self.tokens.role.masked_fill(~self.held, int(Role.QUESTION))
        facts = HostFacts.of(self.tokens.replace(role=role), self.scopes, 0, self.ids.device)
        breaks = int((role == Role.SEPARATOR).sum(1).max())
        answers = min(bucket(facts.answers), role.shape[1]) if facts.answers else 0
        question = replace(facts.question, longest=answers)  # of rows with images, which alone are asked about
        return replace(facts, separators=breaks, answers=answers, question=question)

    @property
    def visual(self) -> bool:
        """Whether any row holds visual tokens."""
        return any(bool(where.any()) for where in self.kinds.values())

    def layout(self) -> Hashable:
        """All that a program with methods knows on the host."""
        facts = self.facts
        units = tuple((scope, units.units) for scope, units in sorted(facts.units.items()))
        return units, tuple(facts.others), facts.lines, facts.images, facts.separators, facts.answers

    def packed(self, acts: bool) -> torch.Tensor:
        """Everything that differs from prompt to prompt, as one int64 vector; `unpacked` is the inverse."""
        parts = [self.ids, self.position, torch.tensor(self.fill), self.where]
        if acts:
            role = self.tokens.role.masked_fill(~self.held, int(Role.QUESTION))
            parts += [role, *(getattr(self.tokens, name) for name in FIELDS[1:])]
            parts += [units.key for _, units in sorted(self.facts.units.items())]
        return torch.cat([part.flatten().long() for part in parts])

    def unpacked(self, packed: torch.Tensor, acts: bool) -> Unpacked:
        """The tensors of `packed`, wherever it is; only shapes are taken from this prompt."""
        axes, batch, length = self.position.shape
        plane = (batch, length)
        shapes: list[Sequence[int]] = [plane, (axes, *plane), (batch,), (len(self.where),)]
        if acts:
            shapes += [plane] * (len(FIELDS) + len(self.facts.units))
        sizes = [torch.Size(shape).numel() for shape in shapes]
        ids, position, fill, where, *rest = (
            part.view(*shape) for part, shape in zip(packed.split(sizes), shapes, strict=True)
        )
        return Unpacked(ids, position, fill, where, rest[: len(FIELDS)], rest[len(FIELDS) :])


@dataclass(frozen=True)
class Unpacked:
    """A prompt's tensors on the device; `fields` as in `FIELDS`, `keys` one per scope."""

    ids: torch.Tensor
    position: torch.Tensor
    fill: torch.Tensor
    where: torch.Tensor
    fields: list[torch.Tensor]
    keys: list[torch.Tensor]

    def tokens(self, layers: int) -> TokenMap:
        """The token map as methods get it."""
        size = torch.ones(self.ids.shape, device=self.ids.device)
        until = torch.full_like(self.ids, layers, dtype=torch.int32)
        unknown = self.ids.new_full((1, 1), -1).expand_as(self.ids)
        rest = dict.fromkeys(("row", "col", "view", "frame"), unknown)
        rest |= dict(zip(FIELDS, self.fields, strict=True))
        here = torch.arange(self.ids.shape[1], device=self.ids.device).repeat(len(self.ids), 1)
        return TokenMap(**rest, position=self.position, size=size, lives_until=until, carried_by=here)

    def facts(self, host: HostFacts, tokens: TokenMap) -> HostFacts:
        """`host` with its tensors on the device, where `tokens` are."""
        device = self.ids.device
        units = {
            scope: Units(known.units, known.rows.to(device), known.ordinals.to(device), key)
            for (scope, known), key in zip(sorted(host.units.items()), self.keys, strict=True)
        }
        last = self.ids.shape[1] - 1 - self.fill
        # the filling is no part of the question
        asks = question_at(tokens, 0) & (torch.arange(self.ids.shape[1], device=device) <= last[:, None])
        return replace(host, units=units, last=last, tail=self.fill, question=replace(host.question, at=asks))
