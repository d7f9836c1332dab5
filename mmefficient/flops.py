"""Arithmetic of the prefill and size of the cache, from the text config."""

from __future__ import annotations

from typing import Any

from mmefficient.points import VisualWork


def layer_flops(config: Any, rows: int) -> int:
    """FLOPs of one decoder layer over `rows` tokens of one prompt, 2 per multiply-accumulate.

    With D hidden size, I feed-forward width, H query and G key/value heads of size d:
    2 * rows * (D*d*(2H + 2G) + 3*D*I) for the matrices (D*d*(2H + 2G) is the 4*D^2 of multi-head attention), and
    2 * 2 * rows^2 * H*d for attention, counted as the full square like the literature does; a causal kernel does half.
    Only the decoder layers count: no vision tower, projector, norms or language model head.
    """
    return rows * token_flops(config) + rows * rows * pair_flops(config)


def token_flops(config: Any) -> int:
    """FLOPs of one token in the matrices of one decoder layer."""
    width, heads = config.hidden_size, config.num_attention_heads
    return 2 * (width * head_size(config) * (2 * heads + 2 * key_heads(config)) + 3 * width * ffn_width(config))


def stored_flops(config: Any) -> int:
    """FLOPs of one token's key and value in one decoder layer."""
    return 2 * config.hidden_size * 2 * key_heads(config) * head_size(config)


def ffn_width(config: Any) -> int:
    """Inner width of the FFN that one token passes through."""
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return inner * experts


def pair_flops(config: Any) -> int:
    """FLOPs of one query-key pair in the attention of one decoder layer, all heads together."""
    return 4 * config.num_attention_heads * head_size(config)


def key_heads(config: Any) -> int:
    """Key/value heads of a layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: Any) -> int:
    """Width of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values; `tokens` is summed over layers and rows, `itemsize` the bytes of one number."""
    return 2 * tokens * key_heads(config) * head_size(config) * itemsize


def visual_savings(config: Any, rows: int, visual: int, work: VisualWork) -> int:
    """FLOPs that `layer_flops` counts and a layer that does `work` for `visual` of its `rows` tokens does not compute.

    Rows that ask nothing save their query projection and their line of the attention square; without an update by
    attention, the output projection too; without values, theirs. Patterns that leave queries to visual rows count as
    the full square.
    """
    width, heads = config.hidden_size, config.num_attention_heads * head_size(config)
    saved = 2 * 3 * width * round(ffn_width(config) * (1 - work.ffn)) - 2 * work.extra
    if not work.values:
        saved += 2 * width * key_heads(config) * head_size(config)
    if work.attention != "full":
        saved += 2 * width * heads * (2 if work.attention == "nothing" else 1) + rows * pair_flops(config)
    return visual * saved
