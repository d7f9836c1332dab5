"""Pyramid sparse attention (Li et al., 2025): keys are the coarser the less they matter to a block of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import causal
from mmefficient.points import Layers, Pattern, about
from mmefficient.tokens import Role, TokenMap

LEVELS = (1, 2, 4, 8)
DIAGONALS = 16  # of so many pairs of rows and keys one is looked at
UNSEEN = float("-inf")


@dataclass(frozen=True)
class PSA(Pattern):
    """Visual rows see earlier visual tokens in blocks: exact, or averaged by 2, 4 or 8, or not at all.

    An average counts by its size: the log of it is added to its logit. The rows' own block, the first one and all text
    are exact, and so is what text rows see.
    """

    name: ClassVar[str] = "psa"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.04025"
    summary: ClassVar[str] = "visual tokens see far ones averaged, the coarser the less they matter (PSA)"

    levels: tuple[float, ...] = field(
        default=(0.05, 0.1, 0.1, 0.25),
        metadata=about("shares of blocks that are exact, and averaged by 2, 4 and 8; the rest is not seen"),
    )
    block: int = field(default=128, metadata=about("visual tokens of a block, a multiple of 8", quiet=True))
    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) != len(LEVELS) or min(self.levels) < 0 or sum(self.levels) > 1 + 1e-6:
            raise PlanError(f"{self}: levels are four shares that add up to at most 1, such as (0.05, 0.1, 0.1, 0.25).")
        if self.block < 8 or self.block % 8:
            raise PlanError(f"{self}: block={self.block} is no multiple of 8.")

    def pairs(self) -> Pairs:
        return causal()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: TokenMap, scale: float
    ) -> torch.Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
        rows = zip(query, key, value, tokens.visual, tokens.role != Role.PAD, strict=True)
        return torch.stack([self._row(*row, scale) for row in rows])

    def _row(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visual: torch.Tensor,
        real: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """One row of the batch, [H, n, d]; bool [n] `visual` and `real`."""
        at, slots = visual.nonzero()[:, 0], torch.arange(len(visual), device=visual.device)
        seen = (slots <= slots[:, None]) & real & real[:, None] | slots.eq(slots[:, None])  # padding sees itself
        keys, values, masks = [key], [value], []
        block = torch.arange(len(at), device=at.device) // self.block
        level = self.level(query[:, at], key[:, at], block, scale)[:, block]  # [H, visual rows, blocks]
        exact = torch.where(seen, 0.0, UNSEEN).expand(len(query), -1, -1).clone()
        pairs = exact[:, at[:, None], at]
        exact[:, at[:, None], at] = pairs.masked_fill(level[..., block] != 1, UNSEEN)
        masks.append(exact)
        for size in LEVELS[1:]:
            group = torch.arange(len(at), device=at.device) // size
            count = torch.bincount(group)
            for parts, given in ((keys, key), (values, value)):
                pooled = given.new_zeros(len(given), len(count), given.shape[-1]).index_add_(1, group, given[:, at])
                parts.append(pooled / count[:, None].to(pooled))
            mine = block[::size]
            coarse = torch.full((len(query), len(visual), len(count)), UNSEEN, device=query.device)
            coarse[:, at] = torch.where(level[..., mine] == size, count.float().log(), UNSEEN)
            masks.append(coarse)
        mask = torch.cat(masks, -1).to(query.dtype)
        key, value = torch.cat(keys, 1), torch.cat(values, 1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def level(self, query: torch.Tensor, key: torch.Tensor, block: torch.Tensor, scale: float) -> torch.Tensor:
        """How many keys are averaged into one, [H, row blocks, key blocks]; 0 = not seen, also by causality.

        Args:
            query, key: of the visual tokens, [H, N, d]; block: int64 [N], which block each is in.
        """
        count, place = -(-len(block) // self.block), torch.arange(len(block), device=block.device)
        logits = (query @ key.transpose(1, 2)).float() * scale
        looked = ((place + place[:, None]) % DIAGONALS == 0) & (place <= place[:, None])
        spread = logits.masked_fill(~looked, UNSEEN).softmax(-1).nan_to_num(0.0)
        sums = spread.new_zeros(len(query), count, len(block)).index_add_(1, block, spread)
        sums = spread.new_zeros(len(query), count, count).index_add_(2, block, sums)
        mine = torch.arange(count, device=block.device)
        ranked = (mine < mine[:, None]) & (mine > 0)  # neither later, nor the own, nor the first
        order = sums.masked_fill(~ranked, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        found = torch.zeros_like(order)
        limits, total = [math.fsum(self.levels[: i + 1]) for i in range(len(LEVELS))], ranked.sum(-1)[:, None]
        for size, limit in reversed(list(zip(LEVELS, limits, strict=True))):
            found = torch.where(order < (limit * total).ceil(), size, found)
        whole = (mine == mine[:, None]) | ((mine == 0) & (mine <= mine[:, None]))
        return torch.where(whole, 1, torch.where(ranked, found, 0))
