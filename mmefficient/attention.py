"""One attention function per stock implementation: calls it unchanged, scores rows of the prompt when asked, and hands
layers with a modulation to `steering`."""

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
from mmefficient.points import KEYS
from mmefficient.steering import Aside, attend

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


class Probe:
    """Rides in place of a call when a layer's attention module is run for its queries and keys alone."""

    query: torch.Tensor
    key: torch.Tensor
    scale: float


class Scoring:
    """An attention function that wraps `implementation`."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [B, Hq, Q, D], key and value [B, Hkv, K, D]; returns what the wrapped function returns."""
        call = kwargs.pop(KEY, None)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if isinstance(call, Probe):
            call.query, call.key, call.scale = query, key, scale
            return query.transpose(1, 2), None  # of the right shape, and thrown away
        if call is not None and not isinstance(call, Aside):
            score(call, module, query, key, attention_mask, scale)
        if self.implementation == "eager":
            function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[self.implementation]
        # flash kernels are looked up by the name in the module's config
        seen = _Unwrapped(module, self.implementation) if "flash" in self.implementation else module
        if isinstance(call, Aside):
            out, weights = function(seen, query, key, value, attention_mask, **kwargs)
            return call.attended(out), weights
        if call is None or not call.steers(module.layer_idx):
            return function(seen, query, key, value, attention_mask, **kwargs)

        def stock() -> torch.Tensor:
            return function(seen, query, key, value, attention_mask, **kwargs)[0]

        return attend(module.layer_idx, query, key, value, attention_mask, call, scale, stock), None


def score(
    call: Any, module: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> None:
    """Hand over the scores that methods want from the layer of `module`; tensors as in `row_scores`."""
    if call.asks_key_norms(module.layer_idx):
        call.set_scores(KEYS, key.float().abs().sum((1, 3)))
    for asker, rows, used in call.asking(module.layer_idx):
        call.set_scores(asker, row_scores(query, key, mask, rows, used, scale))


def row_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    used: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Probability each key receives from some rows, mean over them and over heads, float32 [B, K].

    Args:
        query, key: as the attention function gets them; mask: likewise, rows for all queries or two-dimensional.
        rows: int64 [B, R], the rows that ask; None = the last one everywhere.
        used: bool [B, R], which of them count; None = all. Nobody gives 0 to every key.
    """
    if mask is None:
        key = key[:, :, : query.shape[2]]  # a static cache offers unwritten rows
    elif mask.ndim == 2:
        mask = mask[:, None, None]
    if rows is None:
        query = query[:, :, -1:]
        mask = mask if mask is None else mask[:, :, -1:]
    else:
        at = rows.to(query.device)[:, None, :, None]
        query = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[3]))
        if mask is None or mask.shape[2] == 1:
            # a row in the middle sees what precedes it
            causal = torch.arange(key.shape[2], device=query.device) <= at
            mask = causal if mask is None else mask.bool() & causal
        else:
            mask = mask.expand(len(at), *mask.shape[1:])
            mask = mask.gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
    if used is None:
        return key_scores(query, key, scale=scale, mask=mask, heads="mean")
    used = used.to(query.device)
    assert mask is not None
    if mask.dtype == torch.bool:
        mask = mask & used[:, None, :, None]
    else:
        mask = mask.masked_fill(~used[:, None, :, None], float("-inf"))
    total = key_scores(query, key, scale=scale, mask=mask, rows="sum", heads="mean")
    return total / used.sum(1, keepdim=True).clamp(min=1)


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
