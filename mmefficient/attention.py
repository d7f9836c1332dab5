"""One attention function per stock implementation: calls it unchanged, and scores the last prompt row when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmefficient.errors import ModelError
from mmefficient.kernels.key_scores import key_scores

KEY = "mmefficient"
"""Name of the private keyword argument that carries the state of a forward call."""

PREFIX = "mmefficient_"


class _Unwrapped:
    """An attention module as its own implementation would see it: with its own implementation's name in the config."""

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module, self._attn_implementation = module, implementation
        self.config = self

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__["_module"]
        return getattr(module, name) if hasattr(module, name) else getattr(module.config, name)


class Scoring:
    """An attention function that wraps `implementation`."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [B, Hq, Q, D], key and value [B, Hkv, K, D]; returns what the wrapped function returns."""
        call = kwargs.pop(KEY, None)
        if call is not None and call.wants_scores(module.layer_idx):
            scale = kwargs.get("scaling")
            scores = last_row_scores(query, key, attention_mask, call.last, scale or query.shape[-1] ** -0.5)
            call.set_scores(scores)
        if self.implementation == "eager":
            stock: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        else:
            stock = ALL_ATTENTION_FUNCTIONS[self.implementation]
        # flash kernels are looked up by the name in the module's config
        seen = _Unwrapped(module, self.implementation) if "flash" in self.implementation else module
        return stock(seen, query, key, value, attention_mask, **kwargs)


def last_row_scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, last: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Mean over heads of the probability each key receives from the last prompt row, float32 [B, K].

    Args:
        query, key: as the attention function gets them; mask: likewise, rows for all queries or two-dimensional.
        last: int64 [B], the last prompt row of each batch row; None = the last one everywhere.
    """
    if mask is None:
        key = key[:, :, : query.shape[2]]  # a static cache offers unwritten rows
    elif mask.ndim == 2:
        mask = mask[:, None, None]
    if last is None:
        query = query[:, :, -1:]
        mask = mask if mask is None else mask[:, :, -1:]
    else:
        at = last.to(query.device)[:, None, None, None]
        query = query.gather(2, at.expand(-1, query.shape[1], 1, query.shape[3]))
        if mask is None or mask.shape[2] == 1:
            # a row in the middle sees what precedes it
            causal = torch.arange(key.shape[2], device=query.device) <= at
            mask = causal if mask is None else mask.bool() & causal
        else:
            mask = mask.expand(len(at), *mask.shape[1:])
            mask = mask.gather(2, at.expand(-1, mask.shape[1], 1, mask.shape[3]))
    return key_scores(query, key, scale=scale, mask=mask).mean(1)


def scoring(implementation: str) -> str:
    """Name of the scoring version of an attention implementation; registers it on first use.

    Raises:
        ModelError: the implementation cannot be wrapped.
    """
    if implementation.startswith(PREFIX):
        return implementation
    if implementation == "flex_attention" or implementation.startswith("paged|"):
        raise ModelError(f"attention implementation {implementation!r} is not supported; load the model with 'sdpa'.")
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ModelError(f"attention implementation {implementation!r} has no mask function; load with 'sdpa'.")
        AttentionInterface.register(name, Scoring(implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name
