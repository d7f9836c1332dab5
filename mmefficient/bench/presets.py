"""Models to time: geometry presets with random weights (speed does not depend on the values), or any checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PRESETS = ("llava-1.5-7b", "llava-1.5-13b")
TEXT_TOKENS = 99  # the template's 35 and a question of 64, as in the literature's FLOP tables


def _llava(width: int, inner: int, layers: int, heads: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=576)


def load(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The preset or checkpoint called `name`, in eval mode. Raises ModelError for a name that is neither."""
    if name not in PRESETS:
        from mmefficient.loading import load as load_checkpoint

        return load_checkpoint(name, device=str(device), dtype=dtype, attn_implementation=None)[0]
    config = _llava(4096, 11008, 32, 32) if name.endswith("7b") else _llava(5120, 13824, 40, 40)
    return random_model(config, device, dtype)


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A LLaVA with random weights, made on its device: no second copy of 7B parameters passes through the host."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config).to(dtype)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():  # buffers that are no weights were left empty, too
            if hasattr(module, "position_ids"):
                module.position_ids.copy_(torch.arange(module.position_ids.shape[-1])[None])
            if hasattr(module, "inv_freq"):
                for name, value in type(module)(module.config).named_buffers():
                    getattr(module, name).copy_(value)
    return model


def prompt(model: nn.Module, batch: int, text_tokens: int = TEXT_TOKENS) -> dict[str, torch.Tensor]:
    """Random inputs of `batch` rows: one picture each, between the first third of the text and the rest."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    text = torch.randint(10, 1000, (batch, text_tokens), generator=generator)
    image = torch.full((batch, (size // patch) ** 2), config.image_token_id)
    first = text_tokens // 3
    ids = torch.cat([text[:, :first], image, text[:, first:]], 1).to(device)
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(device, next(model.parameters()).dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
