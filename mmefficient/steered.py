"""What modulations do to rows that come after a prompt, from what they have said while it was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.kernels.decode_attention import decode_attention
from mmefficient.kernels.group_mix import group_mix
from mmefficient.modulation import Change, Gain, Rows

ROOM = 256  # keys by which stored facts grow at a time


class KeyFacts:
    """A fact per stored key, [..., n] for the prompt's slots, and `later` for every key that comes after them.

    Args:
        tail: bool [B, n], slots whose keys later ones take the place of; None = none.

    Attributes:
        stored: the facts of the prompt's slots once it is read.
    """

    def __init__(self, prompt: torch.Tensor, tail: torch.Tensor | None = None, later: float = 0.0) -> None:
        self.prompt, self.later = prompt, later
        if tail is not None:
            prompt = prompt.masked_fill(tail if prompt.ndim == 2 else tail[:, None], later)
        self.stored = self._grown = prompt

    def upto(self, keys: int) -> torch.Tensor:
        """The facts of the first `keys` keys once the prompt is read, as a view."""
        missing = keys - self._grown.shape[-1]
        if missing > 0:
            self._grown = F.pad(self._grown, (0, missing + ROOM), value=self.later)
        return self._grown[..., :keys]


@dataclass(frozen=True, eq=False)
class Part:
    """One method's change in one layer, on `rows`; `group` [B, n] or [B, Hq, n] if it groups keys, `bias` [B or 1,
    Hq or 1, n]."""

    rows: Rows
    change: Change
    groups: int = 1
    group: KeyFacts | None = None
    bias: KeyFacts | None = None

    @property
    def in_kernel(self) -> bool:
        """Whether it needs more than a factor on the output."""
        return self.bias is not None or self.group is not None

    @property
    def per_head(self) -> bool:
        """Whether every head has key groups of its own."""
        return self.group is not None and self.group.prompt.ndim == 3


def new_rows(
    parts: Sequence[Part],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    lengths: torch.Tensor,
    starts: torch.Tensor | None = None,
    unseen: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Attention of at most `MAX_NEW` new rows, all of which `parts` act on, over a stored prompt.

    Args:
        query [B, Hq, R, d], key, value, lengths, starts: as for `decode_attention`; unseen: biases that hide keys.

    Returns:
        [B, Hq, R, d].
    """
    owner, keys = owner_of(parts), key.shape[2]
    biases = [*(part.bias.upto(keys) for part in parts if part.bias is not None), *unseen]
    options: dict[str, Any] = {"starts": starts, "scale": scale}
    if owner is not None and owner.group is not None:
        options |= {"group": owner.group.upto(keys), "groups": owner.groups}
    gains = [_factor(part.change.gain, query) for part in parts if part.change.gain is not None]
    if gains:
        options["head_gain"] = reduce(torch.mul, gains)
    return run_with(partial(decode_attention, query, key, value, lengths, **options), owner, biases)


def owner_of(parts: Sequence[Part]) -> Part | None:
    """The part that groups the keys; the plan's rules allow one."""
    return next((part for part in parts if part.group is not None), None)


def run_with(run: Callable[..., Any], owner: Part | None, biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Call a kernel with what the parts ask for; [B, Hq, R, d] in the dtype of the queries."""
    bias = torch.stack(torch.broadcast_tensors(*biases)).sum(0) if len(biases) > 1 else (*biases, None)[0]
    change = Change() if owner is None else owner.change
    query = run.args[0]  # type: ignore[attr-defined]
    found: Any
    if owner is not None and owner.per_head:
        found = _apart(run, bias)
    else:
        found = run(bias=bias, logit_map=change.logit_map, partials=change.mix is not None)
    if change.mix is None:
        return found
    (out, lse), mix = found, change.mix
    return group_mix(out, lse, mix.where, mix.move, mix.least, dtype=query.dtype)


def as_rows(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Heads as rows of a batch: [B, H, ...] becomes [B * heads, 1, ...], key heads once for each of their queries."""
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)  # which copies, even once
    return x.flatten(0, 1)[:, None]


def _apart(run: Callable[..., Any], bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's partial results, [groups, B, Hq, R, d] and [groups, B, Hq, R], with groups that differ by head.

    A plan of blocks, which `grouped_attention` takes, has been made for heads as rows.
    """
    query, key, value, fourth = run.args  # type: ignore[attr-defined]
    batch, heads = query.shape[:2]
    given = dict(run.keywords)  # type: ignore[attr-defined]
    for name in ("group", "head_gain"):
        if given.get(name) is not None:
            given[name] = given[name].expand(batch, heads, -1).flatten(0, 1)
    if given.get("head_gain") is not None:
        given["head_gain"] = given["head_gain"][:, None]
    if given.get("starts") is not None:
        given["starts"] = given["starts"].repeat_interleave(heads)
    if torch.is_tensor(fourth):
        fourth = fourth.repeat_interleave(heads)
    if bias is not None:
        given["bias"] = bias.expand(batch, heads, -1).flatten(0, 1)[:, None]
    rows = (as_rows(x, heads) for x in (query, key, value))
    found = run.func(*rows, fourth, **given, partials=True)  # type: ignore[attr-defined]
    out, lse = (x[:, :, 0].unflatten(1, (batch, heads)) for x in found)
    return out, lse


def _factor(gain: Gain, query: torch.Tensor) -> torch.Tensor:
    """Factor on the head outputs, [B, Hq, R or 1], for queries [B, Hq, R, d]."""
    return gain[..., None] if torch.is_tensor(gain) else gain(query)


def scaled(out: torch.Tensor, gain: Gain, query: torch.Tensor) -> torch.Tensor:
    """Head outputs [B, R, Hq, d] times `gain`, for the rows' queries [B, Hq, R, d]."""
    return (out * _factor(gain, query).transpose(1, 2)[..., None]).to(out.dtype)
