"""Merging alike tokens (ToMe): one round of it, and a vision tower that merges between its layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mmefficient.errors import ModelError, PlanError
from mmefficient.points import Unit, resolve_budget
from mmefficient.tower import Thinning

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter


@dataclass(frozen=True)
class Merge:
    """A round of merging: which tokens go into which others. Tokens at even places are a, at odd ones b.

    Attributes:
        stay: int64 [B, A - r], places among a that stay as they are; src: int64 [B, r], those that are merged.
        dst: int64 [B, r], the place among b that each of `src` goes into.
    """

    stay: torch.Tensor
    src: torch.Tensor
    dst: torch.Tensor

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Sums: [B, N, ...] -> [B, N - r, ...], what is left of a first, then b."""
        a, b = x[:, ::2], x[:, 1::2]
        return torch.cat([_take(a, self.stay), b.scatter_add(1, _fit(self.dst, a), _take(a, self.src))], 1)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """The same, but b stays as it is."""
        return torch.cat([_take(x[:, ::2], self.stay), x[:, 1::2]], 1)

    def __call__(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Means weighted by `size` [B, N]."""
        weight = size.view(*size.shape, *(1,) * (x.ndim - 2))
        total = self.add(size)
        return (self.add(x * weight) / total.view(*total.shape, *(1,) * (x.ndim - 2))).to(x.dtype)


def match(metric: torch.Tensor, count: int, lead: bool = False) -> Merge:
    """The `count` most alike pairs of a token at an even place and its likest at an odd one.

    Args:
        metric: float32 [B, N, d], compared by cosine; ties go to the earlier token.
        lead: the first token takes no part.
    """
    metric = F.normalize(metric, dim=-1)
    alike = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if lead:
        alike[:, 0] = float("-inf")
    best, to = alike.max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    src = order[:, :count]
    return Merge(order[:, count:].sort(1).values, src, to.gather(1, src))


def _fit(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, _fit(index, x))


def schedule(tokens: int, target: int, rounds: int) -> list[int]:
    """Tokens left after 0, 1, ... `rounds` rounds: the same number leaves in each, or, if that would be more than half
    of what a round has, the same share.

    Raises:
        PlanError: halving does not get there.
    """
    steps = range(rounds + 1)
    plans = [
        [tokens - round((tokens - target) * step / max(1, rounds)) for step in steps],
        [max(target, round(tokens * (target / tokens) ** (step / max(1, rounds)))) for step in steps],
        [max(target, -(-tokens // 2**step)) for step in steps],
    ]
    for counts in plans:
        if counts[-1] == target and all(after >= before - before // 2 for before, after in pairwise(counts)):
            return counts
    raise PlanError(
        f"tome cannot get from {tokens} to {target} patches in {rounds} rounds that halve at most; keep more, or merge "
        "with where=output."
    )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.homes: torch.Tensor | None = None
        self.size: torch.Tensor | None = None


_thread = _Thread()


class MergingLayers(Thinning):
    """Merges tokens between the tower's layers, up to the one whose output the projector reads.

    Keys of a layer say what is alike. Later layers attend to merged tokens in proportion to their size, by a mask.

    Args:
        keep: patches that are left, a fraction or a count.

    Raises:
        PlanError: so few cannot be reached by halving between all layers.
        ModelError: the tower's attention takes no mask of sizes.
    """

    def __init__(self, adapter: Adapter, keep: float | int) -> None:
        super().__init__(adapter)
        layers, index = adapter.tower_layers()
        self.layers: list[Any] = list(layers)[: index + 1]
        unit = Unit(0, "a crop", 0, self.side**2, ((self.side, self.side),))
        self.counts = schedule(unit.count, resolve_budget(keep, unit), index)
        if "flash" in str(self.tower.config._attn_implementation):
            raise ModelError("a vision tower with flash attention cannot weigh merged tokens; load it with 'sdpa'.")

    def attach(self) -> list[Callable[[], Any]]:
        undo = super().attach()
        for number, layer in enumerate(self.layers):
            enter = partial(self.on_layer, number)
            undo.append(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.append(layer.self_attn.k_proj.register_forward_hook(self.on_key).remove)
        return undo

    def on_key(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        _thread.keys = out

    def on_layer(
        self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Merge what enters `layer`, and let it weigh the tokens by their size."""
        hidden, patches = args[0], self.side**2
        if number == 0:
            lead = hidden.shape[1] - patches
            numbers = torch.arange(-lead, patches, device=hidden.device)  # a CLS token is number -1
            _thread.homes = numbers.expand(len(hidden), -1)
            _thread.size = torch.ones(_thread.homes.shape, device=hidden.device)
        homes, size = _thread.homes, _thread.size
        assert homes is not None
        assert size is not None
        if number > 0 and (leaving := self.counts[number - 1] - self.counts[number]):
            assert _thread.keys is not None
            keys = _thread.keys.unflatten(-1, (layer.self_attn.num_heads, -1)).float().mean(2)
            merge = match(keys, leaving, lead=hidden.shape[1] > self.counts[number - 1])
            hidden = merge(hidden.float(), size).to(hidden.dtype)
            _thread.homes, _thread.size = homes, size = merge.keep(homes), merge.add(size)
        if number == len(self.layers) - 1:
            self.settle(homes[:, homes.shape[1] - self.counts[-1] :])
            _thread.keys = _thread.homes = _thread.size = None
        if self.counts[number] == patches:
            return None
        weight = size.log()[:, None, None].to(hidden.dtype)
        if len(args) > 1:
            return (hidden, weight, *args[2:]), kwargs
        return (hidden,), {**kwargs, "attention_mask": weight}
