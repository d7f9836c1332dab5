"""One decoder layer in few launches, over the weights of the stock module where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mmefficient.kernels.decode_linear import MAX_ROWS, decode_linear
from mmefficient.kernels.rms_norm import rms_norm
from mmefficient.kernels.rope_store import rope_store
from mmefficient.kernels.swiglu import swiglu
from mmefficient.rows import RowLayer

Rope = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Rotated queries [B, Hq, N, D], all stored keys and values [B, Hkv, room, D], scale -> [B, Hq, N, D]."""

PLAIN = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen2_5_VLDecoderLayer"})
"""Layers that compute x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x))), and nothing else."""


def refusal(layer: nn.Module) -> str | None:
    """Why a decoder layer of this make is not computed here; None if it is."""
    kind = type(layer)
    if kind.__name__ not in PLAIN or not kind.__module__.startswith("transformers.models."):
        return f"layers of type {kind.__name__} are computed by their own module only"
    attention: Any = layer.self_attn
    config = attention.config
    if config.hidden_act != "silu" or getattr(config, "sliding_window", None) is not None:
        return "the layers use a sliding window or an activation other than silu"
    if any(type(child) is not nn.Linear for child in _linears(layer)):
        return "the layers hold quantised or adapted weights"
    return None


def replaced(module: nn.Module) -> bool:
    """Whether somebody else's forward stands in for the module's own."""
    forward = vars(module).get("forward")
    if isinstance(forward, RowLayer):
        return getattr(forward.__wrapped__, "__func__", None) is not type(module).forward
    return forward is not None


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def product(
    x: torch.Tensor, linears: Sequence[Any], norm: Any = None, gated: bool = False, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """One to three linear layers of x [B, N, K], after an RMSNorm if given.

    Args:
        gated: `linears` are the gate and the up projection of a gated SiLU; one tensor results.
        residual: [B, N, K'], added to the result of a single layer; its memory is used for it.
    """
    weights, biases = [one.weight for one in linears], [one.bias for one in linears]
    if x.is_cuda and x.shape[0] * x.shape[1] <= (1 if x.dtype == torch.float32 else MAX_ROWS):
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        out = decode_linear(x, weights, biases=biases, norm=scale, eps=eps, gated=gated, residual=residual)
        return (out,) if gated else out.split([len(weight) for weight in weights], -1)
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.variance_epsilon)[0]
    if residual is not None and biases[0] is None and residual.is_contiguous():
        # adds within the product, and rounds once
        residual.flatten(0, 1).addmm_(x.flatten(0, 1), weights[0].t())
        return (residual,)
    parts = tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    if gated and not x.is_cuda:
        gate, up = parts  # nobody else has them, and fresh memory costs a CPU more than arithmetic in it
        return (F.silu(gate, inplace=True).mul_(up),)
    if gated:
        return (swiglu(*parts),)
    return parts if residual is None else (residual + parts[0],)


def block(
    layer: Any,
    hidden: torch.Tensor,
    rope: Rope,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """What `layer` makes of `hidden` [B, N, C], which is overwritten.

    Args:
        rope: cosine and sine, [B or 1, N, D].
        keys, values: [B, Hkv, room, D]; those of the N tokens are written to them.
        slots: int64 [B], where the first of them goes.
    """
    return feed(layer, mix(layer, hidden, rope, keys, values, slots, attend))


def mix(
    layer: Any,
    hidden: torch.Tensor,
    rope: Rope,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """The first half of `block`: attention, and the sum with its update."""
    attention = layer.self_attn
    qkv = product(hidden, (attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm)
    query, key, value = (each.unflatten(-1, (-1, attention.head_dim)) for each in qkv)
    query = rope_store(query, key, value, *rope, keys, values, slots)
    return attended(layer, hidden, query, keys, values, attend)


def turned(query: torch.Tensor, rope: Rope, keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rotated queries [B, Hq, n, D] of `query` [B, n, Hq, D]; nothing is stored. `keys`, `slots`: as in `block`."""
    none = query[:, :, :0]
    return rope_store(query, none, none, *rope, keys[:, :0], keys[:, :0], slots)


def store(
    key: torch.Tensor, value: torch.Tensor, rope: Rope, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write `key`, which is rotated, and `value` [B, N, Hkv, D]; other arguments are those of `block`."""
    rope_store(key[:, :, :0], key, value, *rope, keys, values, slots)


def attended(
    layer: Any, rows: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """`rows` [B, n, C], which are overwritten, and what attention of `query` [B, Hq, n, D] adds to them."""
    mixed = attend(query, keys, values, layer.self_attn.scaling).transpose(1, 2).flatten(2)
    (rows,) = product(mixed, (layer.self_attn.o_proj,), residual=rows)
    return rows


def feed(layer: Any, hidden: torch.Tensor, linears: Sequence[Any] = ()) -> torch.Tensor:
    """The second half of `block`: the FFN, and the sum with its update.

    Args:
        linears: what stands for the FFN's gate, up and down projection; none = themselves.
    """
    mlp = layer.mlp
    gate, up, down = linears or (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    (inner,) = product(hidden, (gate, up), layer.post_attention_layernorm, gated=True)
    (hidden,) = product(inner, (down,), residual=hidden)
    return hidden


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """Softmax attention; `mask` as in `masks.prefill_mask`, `causal` only where there is none."""
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
