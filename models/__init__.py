"""Model families: one short adapter each, and the embedded reference model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch import nn

from mmefficient.errors import ModelError

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

FAMILIES = {
    "llava": "llava:LlavaAdapter",
    "llava_next": "llava_next:LlavaNextAdapter",
    "llava_onevision": "llava_onevision:LlavaOnevisionAdapter",
    "qwen2_5_vl": "qwen2_5_vl:Qwen25VLAdapter",
}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a stock transformers model.

    Raises:
        ModelError: the model has no vision tower, or its family is not supported.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        if getattr(config, "vision_config", None) is None:
            raise ModelError(f"{type(model).__name__} has no vision tower; load a vision-language model instead.")
        raise ModelError(f"model family {family!r} is not supported; supported are: {', '.join(FAMILIES)}.")
    if getattr(model, "base_model", model) is model:
        raise ModelError(f"{type(model).__name__} has no language model head; load the ForConditionalGeneration class.")
    module, name = FAMILIES[family].split(":")
    adapter: type[Adapter] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return adapter(model)
