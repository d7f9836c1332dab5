"""Arithmetic of the prefill, from the text config."""

from __future__ import annotations

from typing import Any


def layer_flops(config: Any, rows: int) -> int:
    """FLOPs of one decoder layer over `rows` tokens of one prompt, 2 per multiply-accumulate.

    With D hidden size, I feed-forward width, H query and G key/value heads of size d:
    2 * rows * (D*d*(2H + 2G) + 3*D*I) for the matrices (D*d*(2H + 2G) is the 4*D^2 of multi-head attention), and
    2 * 2 * rows^2 * H*d for attention, counted as the full square like the literature does; a causal kernel does half.
    Only the decoder layers count: no vision tower, projector, norms or language model head.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = (getattr(config, "moe_intermediate_size", None) or config.intermediate_size) * experts
    matrices = width * size * (2 * heads + 2 * groups) + 3 * width * inner
    return 2 * rows * matrices + 4 * rows * rows * heads * size
