"""The lists of blocks and rows hold what the definition of a layout says."""

from __future__ import annotations

import pytest
import torch

from mmefficient.kernels.grouped_attention import Layout
from mmefficient.kernels.grouped_attention.blocks import pairs_by_block
from tests.kernels.prompts import layout_for
from tests.kernels.test_grouped_attention import PATTERNS

REAL = pytest.param(2881, marks=pytest.mark.gpu)


def tiles(pairs: torch.Tensor, rows: int, keys: int) -> torch.Tensor:
    """[Q, K, rows, keys] of [.., ..]; what lies outside does not exist."""
    pad = (0, -pairs.shape[1] % keys, 0, -pairs.shape[0] % rows)
    return torch.nn.functional.pad(pairs, pad).unflatten(1, (-1, keys)).unflatten(0, (-1, rows)).transpose(1, 2)


def listed(blocks: torch.Tensor, counts: torch.Tensor) -> dict[int, int]:
    """State by block: 1 some pairs, 2 all, 3 some because of the groups alone."""
    found = {}
    for kind in (0, 1):
        for entry in blocks[kind, : counts[kind]].tolist():
            found[entry & 0xFFFFFF] = 2 if kind else 3 if entry >> 24 & 1 else 1
    return found


def check(layout: Layout, block: int) -> None:
    made = layout.schedule
    assert made is not None
    pairs, key = layout.visible(), torch.arange(layout.role.shape[1], device=layout.role.device)
    work = 0
    for b in range(len(pairs)):
        soft, rest, source, left = (made.lists[i, b, 0] for i in range(4))
        rows = soft[soft >= 0].long()
        assert soft[-1] >= 0 or not len(rows)
        assert rows.tolist() == sorted(rows.tolist())
        solo = rest[rest >= 0].long()
        assert sorted([*rows.tolist(), *solo.tolist()]) == list(range(pairs.shape[2]))
        assert torch.equal(pairs[b, 0, solo], key == source[: len(solo), None])
        copied = made.copied[b, 0]
        taken = [*left[left >= 0].tolist(), *copied[copied >= 0].tolist()]
        assert sorted(taken) == sorted(solo.tolist())
        assert torch.equal(layout.queries[b, copied[copied >= 0].long()].long(), key[copied >= 0])
        for kind in range(made.blocks.shape[1]):
            seen = torch.zeros(len(soft), len(key), dtype=torch.bool, device=key.device)
            seen[soft >= 0] = pairs[b, 0, rows]
            within = seen if kind == 0 or layout.group is None else seen & (layout.group[b] == kind - 1)
            used = (soft >= 0)[:, None].expand(-1, len(key))
            every, some = tiles(seen, block, block), tiles(within, block, block).any(-1).any(-1)
            blocks, ghosts = tiles(within, block, block), tiles(~used, block, block)
            for qb in range(every.shape[0]):
                wanted = {}
                for kb in some[qb].nonzero()[:, 0].tolist():
                    full, whole = (bool((t[qb, kb] | ghosts[qb, kb]).all()) for t in (blocks, every))
                    wanted[kb] = 2 if full else 3 if whole else 1
                found = listed(made.blocks[:, kind, b, 0, qb], made.counts[:, kind, b, 0, qb])
                assert found == wanted, (b, kind, qb)
                work += len(found) * (kind == 0)
    assert work == made.work


@pytest.mark.parametrize("length", [1, 2, 65, REAL])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists(device: torch.device, pattern: str, length: int) -> None:
    block = 32 if length < 100 else 64
    check(layout_for(PATTERNS[pattern], length, device, blocks=(block, block)), block)


def test_lists_of_fewer_rows(device: torch.device) -> None:
    check(layout_for(PATTERNS["self"], 65, device, queries=20, blocks=(16, 16)), 16)


def test_both_ways(device: torch.device) -> None:
    layout = layout_for(PATTERNS["window"], 65, device, blocks=(16, 16))
    by_rows, by_keys = pairs_by_block(layout, 16, 16)
    assert pairs_by_block(layout, 16, 16)[0][0] is by_rows[0]
    for b in range(3):
        across = {}
        for lists, swap in ((by_rows, False), (by_keys, True)):
            blocks, counts = (t[:, b, 0] for t in lists)
            lines = [listed(blocks[:, i], counts[:, i]) for i in range(counts.shape[1])]
            across[swap] = {(j, i) if swap else (i, j): s for i, line in enumerate(lines) for j, s in line.items()}
        assert across[False] == across[True]
        tile = tiles(layout.visible()[b, 0], 16, 16)
        assert set(across[False]) == {tuple(at) for at in tile.any(-1).any(-1).nonzero().tolist()}
