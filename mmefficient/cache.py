"""Cache layers that store fewer rows than the length they report.

transformers reads lengths, mask sizes and the position of the next token from the cache, and it must keep seeing the
length of the prompt as the user wrote it. So a pruned layer counts the rows it does not hold.
"""

from __future__ import annotations

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from mmefficient.errors import ModelError


class PrunedLayer(DynamicLayer):
    """A growing layer that lacks `dropped` of the rows it reports."""

    def __init__(self, dropped: int) -> None:
        super().__init__()
        self.dropped = dropped

    def get_seq_length(self) -> int:
        stored = super().get_seq_length()
        return stored + self.dropped if stored else 0


class PrunedStaticLayer(StaticLayer):
    """A preallocated layer of `length` rows that reports `dropped` more."""

    def __init__(self, length: int, dropped: int) -> None:
        super().__init__(max_cache_len=length)
        self.dropped = dropped

    def get_seq_length(self) -> int | torch.Tensor:
        # a device tensor, as in the parent class: no host sync; 0 again after reset()
        return (self.cumulative_length + self.dropped) * (self.cumulative_length > 0) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len + self.dropped, 0

    def get_max_length(self) -> int:
        return self.max_cache_len + self.dropped


PRUNED = (PrunedLayer, PrunedStaticLayer)


def fit_layer(cache: Cache, index: int, dropped: int) -> None:
    """Make the still empty layer `index` store `dropped` rows fewer than it reports.

    A layer that was pruned for an earlier prompt and emptied since is fitted anew, or used again if it fits.

    Raises:
        ModelError: the cache is of a kind whose layers cannot be shortened (sliding, quantised, offloaded, ...).
    """
    if not dropped and not (index < len(cache.layers) and isinstance(cache.layers[index], PRUNED)):
        return
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if type(layer) in (DynamicLayer, PrunedLayer):
        cache.layers[index] = PrunedLayer(dropped)
    elif type(layer) in (StaticLayer, PrunedStaticLayer):
        # a layer that fits keeps its buffers: their addresses may be baked into a captured graph
        if not (isinstance(layer, PrunedStaticLayer) and layer.dropped == dropped):
            cache.layers[index] = PrunedStaticLayer(layer.get_max_length() - dropped, dropped)
    else:
        raise ModelError(
            f"a cache layer of type {type(layer).__name__} cannot hold fewer visual tokens; "
            "use the default cache (DynamicCache) or cache_implementation='static'."
        )


def stored_rows(cache: Cache | None, index: int, arriving: int) -> int:
    """How many key rows attention in layer `index` sees once `arriving` rows are written to `cache`."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    if isinstance(layer, StaticLayer):
        return layer.max_cache_len
    if layer is None or not layer.is_initialized or layer.keys.numel() == 0:
        return arriving
    return layer.keys.shape[-2] + arriving


def written_rows(cache: Cache | None, index: int, offered: int) -> int:
    """How many of the `offered` key rows of layer `index` hold something, after this call's rows were written."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return int(layer.cumulative_length) if isinstance(layer, StaticLayer) else offered


def store_first(cache: Cache, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the first rows [B, G, n, d] of layer `index`, which is empty; a growing layer keeps the tensors themselves.

    The stock layer would copy them behind its zero rows, which takes longer than an attention of few rows.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) not in (DynamicLayer, PrunedLayer) or getattr(cache, "offloading", False):
        cache.update(key, value, index)
        return
    assert layer is not None
    layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    layer.keys, layer.values = key, value
