"""Models to time: geometry presets with random weights (speed does not depend on the values), or any checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PRESETS = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "qwen2.5-vl-7b")
TEXT_TOKENS = 99
"""The template's 35 and a question of 64, as in the literature's FLOP tables."""
PICTURE = (672, 672)
"""Width and height: 576 visual tokens in LLaVA-1.5 and Qwen2.5-VL, 2,880 (and 48 line breaks) in LLaVA-NeXT."""
SMALL = 112
"""Side of a picture of 64 tokens (LLaVA-1.5 with such a tower; Qwen2.5-VL needs twice the side)."""

_VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def load(name: str, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> tuple[Any, Any]:
    """Model in eval mode and processor of the preset or checkpoint called `name`.

    A preset reads text with the embedded model's tokenizer. With `small`, LLaVA-1.5 presets have a tower for pictures
    of `SMALL` pixels, so that prompts can hold few visual tokens; for others it changes nothing.

    Raises:
        ModelError: a name that is neither.
    """
    if name not in PRESETS:
        from mmefficient.loading import load as load_checkpoint

        return load_checkpoint(name, device=str(device), dtype=dtype, attn_implementation=None)
    made = _processor(name, small)
    return random_model(_config(name, made, small), device, dtype), made


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made on its device: no second copy of 7B parameters passes through the host."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.to(device).eval()


def prompt(
    model: Any,
    processor: Any,
    batch: int = 1,
    *,
    pictures: int = 1,
    size: tuple[int, int] = PICTURE,
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, torch.Tensor]:
    """Inputs of `batch` rows on the model's device: `pictures` random pictures in each, `text_tokens` of other tokens.

    Args:
        size: width and height of every picture.
        text_tokens: the chat template's included, so never fewer than it has.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch * pictures, 3, size[1], size[0])
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs: dict[str, torch.Tensor] = dict(
        processor(
            images=[list(row) for row in pixels.unflatten(0, (batch, pictures))],
            text=[text] * batch,
            return_tensors="pt",
            add_special_tokens=False,  # the template has them
        )
    )
    ids = inputs["input_ids"]
    missing = max(0, text_tokens - int((ids[0] != model.config.image_token_id).sum()))
    words = _plain(model.config, processor.tokenizer)
    more = words[torch.randint(len(words), (batch, missing), generator=generator)]
    for name, value in inputs.items():
        if value.shape == ids.shape and name != "input_ids":
            inputs[name] = torch.cat([value[:, :-1], value[:, -1:].expand(-1, missing), value[:, -1:]], 1)
    inputs["input_ids"] = torch.cat([ids[:, :-1], more, ids[:, -1:]], 1)
    floating = {name: value.to(model.dtype) for name, value in inputs.items() if value.is_floating_point()}
    return {name: value.to(model.device) for name, value in {**inputs, **floating}.items()}


def visual_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Of every row of `inputs`."""
    return int((inputs["input_ids"][:1] == model.config.image_token_id).sum())


def _plain(config: Any, tokenizer: Any) -> torch.Tensor:
    """Up to 1,000 token ids that are neither special nor placeholders."""
    taken = {value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    size = min(config.get_text_config().vocab_size, len(tokenizer))
    return torch.tensor([i for i in range(size) if i not in taken | set(tokenizer.all_special_ids)][-1000:])


def _config(name: str, processor: Any, small: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig
    from transformers import Qwen2_5_VLConfig as QwenConfig

    token = processor.image_token_id
    if name == "qwen2.5-vl-7b":
        start, _, end, video = processor.tokenizer.convert_tokens_to_ids(list(_VISION))
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
                "rope_parameters": rope, **_ENDS}  # fmt: skip
        tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
        ids = {"video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
        return QwenConfig(text_config=text, vision_config=tower, image_token_id=token, tie_word_embeddings=False, **ids)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SMALL if small and "next" not in name else 336,
        patch_size=14,
        projection_dim=768,
    )
    width, inner, layers, heads = (5120, 13824, 40, 40) if name.endswith("13b") else (4096, 11008, 32, 32)
    llama = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        **_ENDS,
    )
    kind = LlavaNextConfig if "next" in name else LlavaConfig
    return kind(vision_config=vision, text_config=llama, image_token_index=token)


_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _processor(name: str, small: bool) -> Any:
    from transformers import (
        AutoProcessor,
        CLIPImageProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    from mmefficient.models import reference

    base = AutoProcessor.from_pretrained(reference.path())
    tokenizer, template = base.tokenizer, base.chat_template
    tokenizer.padding_side, tokenizer.model_max_length = "left", 2**20
    if name == "qwen2.5-vl-7b":
        start, image, end, video = _VISION
        tokenizer.add_special_tokens({"additional_special_tokens": list(_VISION)}, replace_extra_special_tokens=False)
        for key, token in {"image_token": image, "video_token": video}.items():
            setattr(tokenizer, key, token)
            setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056}),
            tokenizer,
            Qwen2VLVideoProcessor(),
            chat_template=template.replace("<image>", f"{start}{image}{end}"),
        )
    llava = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
             "image_token": base.image_token, "chat_template": template}  # fmt: skip
    if "next" in name:
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        crops = LlavaNextImageProcessor(**_square(336), image_grid_pinpoints=pinpoints)
        return LlavaNextProcessor(crops, tokenizer, **llava)
    return LlavaProcessor(CLIPImageProcessor(**_square(SMALL if small else 336)), tokenizer, **llava)


def _square(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
