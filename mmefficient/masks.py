"""Attention masks for layers that hold only some of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmefficient.errors import ModelError


@dataclass(frozen=True, eq=False)
class Segment:
    """What a run of layers holds of the prompt, as n slots per row.

    Attributes:
        columns: int64 [B, n], the prompt position of each slot, ascending within the valid slots of a row.
        valid: bool [B, n]: the slots that take part; None = all of them.
        length: positions in the prompt, S.
    """

    columns: torch.Tensor
    valid: torch.Tensor | None
    length: int

    @property
    def slots(self) -> int:
        """Rows the layers hold, n."""
        return self.columns.shape[1]

    def without_end(self, count: int) -> Segment:
        """The segment less the last `count` positions of the prompt, all of which it holds."""
        if not count:
            return self
        valid = None if self.valid is None else self.valid[:, :-count]
        return Segment(self.columns[:, :-count], valid, self.length - count)


def prefill_mask(mask: torch.Tensor | None, segment: Segment, keys: int, flash: bool) -> torch.Tensor | None:
    """The mask of a layer whose queries are the slots of `segment`.

    Args:
        mask: what transformers built for the whole prompt: bool or additive [B|1, 1|H, S, L], bool [B|1, L], or None.
        segment: what the layer holds.
        keys: rows the cache layer offers, at least the slots (more with a static cache).
        flash: the attention implementation takes two-dimensional masks.

    Returns:
        a mask of the same kind with one row per slot and one column per key; None when None still is right. A slot that
        takes no part sees itself alone, so that its softmax is defined.
    """
    columns, valid, slots = segment.columns, segment.valid, segment.slots
    if mask is None and valid is None:
        return None
    _refuse_block_mask(mask)
    batch, device = columns.shape[0], columns.device
    seen = None
    if valid is not None:
        seen = torch.cat([valid, valid.new_zeros(batch, keys - slots)], 1)
    if mask is None and flash:
        return seen
    if mask is None:
        full = torch.ones(slots, keys, dtype=torch.bool, device=device).tril()[None, None].expand(batch, 1, -1, -1)
    elif mask.ndim == 2:
        flat = _keep_columns(mask.bool().expand(batch, -1), columns, segment.length)
        return flat if seen is None else flat & seen
    else:
        full = mask.expand(batch, *mask.shape[1:])
        full = full.gather(2, columns[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
        full = _keep_columns(full, columns, segment.length)
    if seen is None:
        return full
    itself = torch.eye(slots, keys, dtype=torch.bool, device=device)
    return torch.where(valid[:, None, :, None], _hide(full, seen), _like(itself, full))  # type: ignore[index]


def decode_mask(
    mask: torch.Tensor | None, segment: Segment, queries: int, keys: int, flash: bool
) -> torch.Tensor | None:
    """The mask of a layer whose queries are `queries` new tokens at the end; arguments as in `prefill_mask`.

    Args:
        keys: rows the layer offers, the new tokens included.
    """
    columns, valid = segment.columns, segment.valid
    if mask is None and valid is None:
        return None
    _refuse_block_mask(mask)
    batch, tail = columns.shape[0], keys - segment.slots
    seen = None if valid is None else torch.cat([valid, valid.new_ones(batch, tail)], 1)
    if mask is None and flash:
        return seen
    if mask is None:
        late = torch.arange(keys, device=columns.device) - (keys - queries)
        causal = late <= torch.arange(queries, device=columns.device)[:, None]
        full = causal[None, None].expand(batch, 1, -1, -1)
    elif mask.ndim == 2:
        flat = _keep_columns(mask.bool().expand(batch, -1), columns, segment.length)
        return flat if seen is None else flat & seen
    else:
        full = _keep_columns(mask.expand(batch, *mask.shape[1:]), columns, segment.length)
    return full if seen is None else _hide(full, seen)


def _refuse_block_mask(mask: torch.Tensor | None) -> None:
    if mask is not None and not torch.is_tensor(mask):
        raise ModelError(f"a {type(mask).__name__} cannot be shortened; load with attn_implementation='sdpa'.")


def _keep_columns(mask: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """Keep the stored prompt columns [B, n] of a mask [B, ..., L], and every column behind the prompt."""
    index = columns if mask.ndim == 2 else columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return torch.cat([mask[..., :length].gather(-1, index), mask[..., length:]], -1)


def _hide(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    seen = seen[:, None, None]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _like(visible: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A bool mask in the kind of `mask`."""
    if mask.dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)


def seen_by_last(mask: torch.Tensor) -> torch.Tensor:
    """bool [B, K]: the keys that the last row sees, from a mask as attention functions get it."""
    mask = mask if mask.ndim == 2 else mask[:, 0, -1]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def hiding(seen: torch.Tensor) -> torch.Tensor:
    """A bias [B, 1, K] that hides the keys that are not `seen`, bool [B, K]."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
