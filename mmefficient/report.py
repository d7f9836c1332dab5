"""What a plan did to one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mmefficient.errors import InputError
from mmefficient.flops import layer_flops, visual_savings
from mmefficient.points import VisualWork
from mmefficient.tokens import Role, TokenMap

PROVENANCE = ("lives_until", "places", "merged_into")
"""Fields of a report that hold tensors per visual token."""


@dataclass(frozen=True)
class RowReport:
    """One row of the batch: visual tokens in the prompt, and how many of them each decoder layer held."""

    visual_total: int
    kept_per_layer: list[int]


@dataclass(frozen=True)
class Report:
    """One `generate` or `forward` call. Beams and repeated samples are rows of their own.

    Attributes:
        plan: the plan as text; mode: "apply" or "simulate".
        rows: one entry per row.
        prefill_flops: of the decoder layers, all rows together (see `flops.layer_flops`); simulating saves nothing.
        prefill_flops_without_plan: likewise, with no plan.
        stored_tokens: prompt tokens whose keys and values are held after the prefill, summed over layers and rows
            (see `flops.kv_bytes`); simulating saves nothing.
        reused_tokens: of these, how many a picture that was read before had (`VLM.encode`); the FLOPs leave them out.
        stages_ms: milliseconds per stage, filled in by whoever timed them.
        generated_tokens: filled in by whoever decoded them.
        engine: what ran the call and what it holds, see `Run.engine`.
        lives_until: per row, int32 [N]: the first decoder layer that no longer holds each visual token, prompt order.
        merged_into: per row, int64 [N]: index (prompt order) of the visual token that carries on each one's features;
            its own if it was kept, or left without being merged.
        places: per row, int64 [N, 4]: image, view, grid row and column of each visual token (see `tokens.Layout`).
    """

    plan: str
    mode: str
    rows: list[RowReport]
    prefill_flops: int
    prefill_flops_without_plan: int
    stored_tokens: int = 0
    reused_tokens: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)
    generated_tokens: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict, compare=False)
    lives_until: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    places: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    merged_into: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(
        cls,
        plan: str,
        mode: str,
        tokens: TokenMap,
        layers: int,
        config: Any,
        works: Mapping[int, VisualWork] | None = None,
    ) -> Report:
        """Report on a prompt.

        Args:
            tokens: the map after the prefill.
            layers: decoder layers; config: of the text model; works: by layer, what it computes for visual rows.
        """
        tokens = tokens.to(torch.device("cpu"))
        held = torch.stack([tokens.alive(layer) for layer in range(layers)])  # [layers, B, S]
        visual = (held & tokens.visual).sum(-1).T.tolist()
        rows = [RowReport(int(total), kept) for total, kept in zip(tokens.visual.sum(1), visual, strict=True)]
        lengths = (tokens.role != Role.PAD).sum(1).tolist()
        full = sum(layers * layer_flops(config, count) for count in lengths)
        computed = sum(layer_flops(config, count) for count in held.sum(-1).flatten().tolist())
        for layer, work in (works or {}).items():
            for total, seen in zip(held[layer].sum(-1).tolist(), (row[layer] for row in visual), strict=True):
                computed -= visual_savings(config, total, seen, work)
        stored = int(held.sum())
        lives = tuple(until[seen] for until, seen in zip(tokens.lives_until, tokens.visual, strict=True))
        where = torch.stack([tokens.image, tokens.view, tokens.row, tokens.col], -1)
        places = tuple(place[seen] for place, seen in zip(where, tokens.visual, strict=True))
        ordinal = tokens.visual.long().cumsum(1) - 1
        into = ordinal.gather(1, tokens.carried_by)
        merged = tuple(target[seen] for target, seen in zip(into, tokens.visual, strict=True))
        if mode != "apply":
            computed, stored = full, layers * sum(lengths)
        return cls(plan, mode, rows, computed, full, stored, lives_until=lives, places=places, merged_into=merged)

    def kept(self, row: int, layer: int) -> torch.Tensor:
        """int64 indices, ascending, into the visual tokens of `row` (prompt order) that decoder layer `layer` held.

        Raises:
            InputError: there is no such row or layer.
        """
        layers = len(self.rows[0].kept_per_layer)
        if not (0 <= row < len(self.rows) and 0 <= layer < layers):
            raise InputError(f"the report has rows 0 to {len(self.rows) - 1} and layers 0 to {layers - 1}.")
        return (self.lives_until[row] > layer).nonzero()[:, 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain: Mapping[str, Any] = asdict(self)
        return {name: value for name, value in plain.items() if name not in PROVENANCE}
