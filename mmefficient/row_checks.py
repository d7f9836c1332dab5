"""Whether a decoder layer is the usual one, so that its visual rows can be run apart (`rows.RowLayer`)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from mmefficient.errors import ModelError
from mmefficient.rows import LayerPlan, RowLayer

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
FFN_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_CHECKED: WeakSet[nn.Module] = WeakSet()


def check_layer(layer: Any, plan: LayerPlan, adapter: Adapter, flash: bool) -> None:
    """Refuse layers that compute something other than `RowLayer` would.

    Raises:
        ModelError: names what is missing or what differs.
    """
    name = type(layer).__name__
    parts, projections = ({part for part, _ in m.named_children()} for m in (layer, layer.self_attn))
    if parts != LAYER_PARTS or not PROJECTIONS <= projections <= PROJECTIONS | HEAD_NORMS:
        found = ", ".join(sorted(parts ^ LAYER_PARTS | projections ^ PROJECTIONS))
        raise ModelError(
            f"{name} is not the usual decoder layer ({found} differ); its visual rows cannot be run apart."
        )
    if not hasattr(sys.modules[type(layer.self_attn).__module__], "rotate_half"):
        raise ModelError(f"{name} rotates queries and keys in its own way; its visual rows cannot be run apart.")
    if 0 < plan.work.ffn < 1:
        linear = [getattr(layer.mlp, part, None) for part in sorted(FFN_PARTS - {"act_fn"})]
        if {part for part, _ in layer.mlp.named_children()} != FFN_PARTS or any(
            type(m) is not nn.Linear for m in linear
        ):
            raise ModelError(f"{type(layer.mlp).__name__} is no gated FFN of plain matrices; its width cannot be cut.")
        if layer.mlp.up_proj.weight.is_meta:
            raise ModelError("the FFN of offloaded weights cannot be cut; load the model on one device.")
    if layer.training or layer in _CHECKED:
        return
    weight = layer.input_layernorm.weight
    # offloaded weights are elsewhere until their module runs
    device = layer.input_layernorm._hf_hook.execution_device if weight.is_meta else weight.device
    probe = torch.randn(1, 2, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(device, weight.dtype)
    position = torch.arange(2, device=device)[None]
    rope = adapter.decoder.rotary_emb(probe, position.expand(3, 1, -1) if adapter.mrope else position)
    ours = RowLayer(layer, plan, False, layer.forward)
    with torch.no_grad():
        normed = layer.input_layernorm(probe)
        query, key, value = (ours.heads(part, normed) for part in "qkv")
        query, key = ours.rotate(query, rope), ours.rotate(key, rope)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options = {"is_causal": True, "scale": layer.self_attn.scaling, "enable_gqa": True}
        update = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2)
        rows = probe + layer.self_attn.o_proj(update)
        rows = rows + ours.mlp(rows)
        mask = None if flash else torch.full((2, 2), torch.finfo(probe.dtype).min).triu(1)[None, None].to(probe)
        stock = layer(probe, attention_mask=mask, position_embeddings=rope, position_ids=position)
    if not torch.allclose(rows - probe, stock - probe, rtol=0.1, atol=0.05 * float((stock - probe).abs().max())):
        raise ModelError(
            f"{name} computes something else than the usual decoder layer; its visual rows cannot be run apart."
        )
    _CHECKED.add(layer)
