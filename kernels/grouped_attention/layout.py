"""What all layers share: which token may see which, and the plan of blocks that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.grouped_attention.pattern import Pattern, causal, table

MAX_GROUPS = 4


@dataclass(frozen=True, eq=False)
class Schedule:
    """Work of the kernels, made on the device. S: patterns, P: 1 + groups, Q and K: query and key blocks.

    Rows of queries that see others ("soft") fill blocks of their own; rows that see themselves alone or nothing
    ("rest") need no softmax.

    Attributes:
        block_m, block_n: rows of a query block, keys of a key block.
        lists: int32 [7, B, S, Q * block_m]; -1 = none. 0: soft rows, the last one in the last place, so that blocks
            of rows that see most are full. 1, 2: rest rows, and the one key each sees (-1 = nothing). 3, 4: like 1 and
            2, without the rows of `copied`. 5, 6: own keys and rules of the rows in 0: one wait fetches all three.
        copied: int32 [B, S, Nk], the rest row that sees this key alone, and to which the last query block, which reads
            the key's value anyway, copies it; -1 = none.
        blocks: int32 [2, P, B, S, Q, K]: the partial (0) and the full (1) key blocks of each query block. Bit 24:
            partial only because some keys are of another group. From bit 26 on: 1 + the group that all of its keys are
            of, or 0.
        counts: int32 [2, P, B, S, Q].
        soft_blocks, rest_blocks, left_blocks: blocks that hold rows of these kinds, at most.
        longest: key blocks of one query block, at most; work: key blocks of all query blocks.
        contiguous: the full key blocks of every query block follow each other.
        launches: what is known about earlier calls with this schedule, so that later ones start faster.
    """

    block_m: int
    block_n: int
    lists: torch.Tensor
    copied: torch.Tensor
    blocks: torch.Tensor
    counts: torch.Tensor
    soft_blocks: int
    rest_blocks: int
    left_blocks: int
    longest: int
    work: int
    contiguous: bool
    launches: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which pairs exist in a prompt of B rows; made by `make_layout`. All tensors int32 on one device.

    Attributes:
        rules: [patterns, 6], one or two patterns, see `Pattern.rules`.
        role, page, row, col, segment, group: [B, Nk], facts about the keys; unused ones are None.
        queries: [B, Nq], the key that belongs to each query row; -1 = padding.
        head_pattern: [Hq], which pattern each head has; None with one pattern.
        mask: bool [B, Nq, Nk], pairs that exist besides; None = all.
        groups: number of key groups, 1 to 4.
        schedule: what the kernels do; None where only the reference runs.
    """

    rules: torch.Tensor
    role: torch.Tensor
    page: torch.Tensor | None
    row: torch.Tensor | None
    col: torch.Tensor | None
    segment: torch.Tensor | None
    group: torch.Tensor | None
    queries: torch.Tensor
    head_pattern: torch.Tensor | None
    mask: torch.Tensor | None
    groups: int
    schedule: Schedule | None

    @cached_property
    def pair_facts(self) -> tuple[torch.Tensor, ...]:
        """Role, page, row, column, segment, group and mask as the kernels take them; unused ones point anywhere."""
        facts = (self.page, self.row, self.col, self.segment, self.group, self.mask)
        return self.role, *(self.role if fact is None else fact for fact in facts)

    def visible(self) -> torch.Tensor:
        """bool [B, patterns, Nq, Nk]: the pairs that exist. Quadratic memory: for the reference and for tests."""
        own = self.queries.long()
        at = own.clamp(min=0)
        role_q, role_k = self.role.gather(1, at), self.role[:, None]
        key = torch.arange(self.role.shape[1], device=self.role.device)
        earlier = key <= own[..., None]
        found = []
        for rules in self.rules:
            rule = rules[role_q.long()][..., None]
            sets = torch.where(earlier, rule & 0xFF, rule >> 8 & 0xFF)
            near = key == own[..., None]
            radius = rules[5]
            if self.page is not None and self.row is not None and self.col is not None:
                same = self.page.gather(1, at)[..., None] == self.page[:, None]
                high = (self.row.gather(1, at)[..., None] - self.row[:, None]).abs() <= radius
                wide = (self.col.gather(1, at)[..., None] - self.col[:, None]).abs() <= radius
                near = near | same & high & wide
            ok = (sets >> role_k & 1).bool() & (near | (rule >> 16 >> role_k & 1 == 0))
            found.append(ok & (own >= 0)[..., None] & (role_k != 0))
        pairs = torch.stack(found, 1)
        if self.segment is not None:
            pairs = pairs & (self.segment.gather(1, at)[..., None] == self.segment[:, None])[:, None]
        return pairs if self.mask is None else pairs & self.mask[:, None]


def default_blocks(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a block. 64 rows beat 128 in every measured case (docs/kernels.md)."""
    return (32 if head_dim > 128 else 64, 32) if dtype == torch.float32 else (64, 64)


def make_layout(
    role: torch.Tensor,
    pattern: Pattern | Sequence[Pattern] | None = None,
    *,
    page: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    col: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    groups: int = MAX_GROUPS,
    queries: torch.Tensor | int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_pattern: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    blocks: tuple[int, int] | None = None,
    exact: bool = True,
    impl: Impl = "auto",
) -> Layout:
    """Plan the attention of a prompt, once for all layers.

    Tokens stand in prompt order; "before" and "after" mean that order. Reads seven integers back from the device,
    unless not `exact`.

    Args:
        role: [B, Nk], any integer type: 0 padding, 1 system text, 2 visual, 3 separator, 4 other text.
        pattern: which pairs exist; causal if None. Two of them need `head_pattern`.
        page, row, col: [B, Nk], image (or tile, or frame) and place in its grid; needed by `window`, `pages_apart`.
        group: [B, Nk] in 0..groups-1, for `logit_map` and partial results; `groups` is at most 4.
        queries: the rows that ask: None = every key; n = the last n keys; or [B, Nq], a key index per row, ascending,
            -1 = padding.
        cu_seqlens: [n + 1] cumulative lengths of sequences packed into a batch of one; they do not see each other.
        head_pattern: [Hq] in 0..1, the pattern of each head.
        mask: bool [B, Nq, Nk], any other restriction; quadratic in memory, and no block is skipped before it is read.
        head_dim, dtype: of the queries; they choose the blocks unless `blocks` = (rows, keys) is given.
        exact: False = reckon with the most work there can be instead of reading back how much there is, so that a
            CUDA graph can hold it.
        impl: "auto", "triton" or "reference"; a layout for the reference alone has no schedule.

    Raises:
        ValueError: tensors that do not fit each other, or a pattern without the places it needs.
    """
    patterns = (causal(),) if pattern is None else (pattern,) if isinstance(pattern, Pattern) else tuple(pattern)
    batch, keys = role.shape
    if len(patterns) not in (1, 2) or (len(patterns) == 2) != (head_pattern is not None):
        raise ValueError("a layout holds one pattern, or two and head_pattern that says which head has which.")
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(f"a layout has 1 to {MAX_GROUPS} key groups, not {groups}.")
    places = any(p.uses_places for p in patterns)
    if places and (page is None or row is None or col is None):
        raise ValueError("this pattern compares places: give page, row and col of the keys.")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"packed sequences are a batch of one, not of {batch}.")
    for name, fact in (("page", page), ("row", row), ("col", col), ("group", group)):
        if fact is not None and fact.shape != role.shape:
            raise ValueError(f"{name} has shape {tuple(fact.shape)}; it needs that of role, {(batch, keys)}.")
    key = torch.arange(keys, device=role.device, dtype=torch.int32)
    if queries is None or isinstance(queries, int):
        queries = key[keys - (keys if queries is None else queries) :].expand(batch, -1)
    if mask is not None and mask.shape != (batch, queries.shape[1], keys):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it needs {(batch, queries.shape[1], keys)}.")
    segment = None
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens.int(), key, right=True, out_int32=True)[None]

    def kept(values: torch.Tensor | None, wanted: bool = True) -> torch.Tensor | None:
        return values.int().contiguous() if values is not None and wanted else None

    layout = Layout(
        rules=table(patterns, role.device),
        role=role.int().contiguous(),
        page=kept(page, places),
        row=kept(row, places),
        col=kept(col, places),
        segment=segment,
        group=kept(group),
        queries=queries.int().contiguous(),
        head_pattern=kept(head_pattern),
        mask=None if mask is None else mask.contiguous(),
        groups=1 if group is None else groups,
        schedule=None,
    )
    if not uses_triton(impl, role):
        return layout
    from mmefficient.kernels.grouped_attention.schedule import schedule

    with launching_on(role):
        return schedule(layout, *(blocks or default_blocks(head_dim, dtype)), exact)
