"""What the executor needs to know about a model family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from mmefficient.errors import ModelError
from mmefficient.tokens import Layout

PIXELS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of pixel normalisation, by the beginning of a vision tower's model type."""


class Adapter:
    """Names the parts of one model; subclasses know one family. Holds no state of a call.

    Attributes:
        base: the multimodal model without a head; its forward merges image features into the text.
        decoder: the language model; `decoder.layers` are called one after the other.
    """

    mrope: ClassVar[bool] = False
    """Whether positions are (time, height, width) triplets."""

    def __init__(self, model: nn.Module) -> None:
        # modules are typed loosely: their parts differ from family to family
        self.base: Any = model.base_model
        self.decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.config: Any = model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.decoder.layers

    @property
    def placeholders(self) -> dict[str, int]:
        """Token id of each kind of visual placeholder."""
        ids = {kind: getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {kind: token for kind, token in ids.items() if isinstance(token, int)}

    def layouts(self, kind: str, arguments: Mapping[str, Any], features: Sequence[torch.Tensor]) -> list[Layout]:
        """Layout of every image.

        Args:
            kind: "image" or "video".
            arguments: what `get_<kind>_features` was called with.
            features: what it returned, one [T, D] per image.
        """
        raise NotImplementedError

    def crops(self, arguments: Mapping[str, Any], images: int) -> list[int]:
        """How many vision tower inputs each image was cut into."""
        return [1] * images

    def tower_parts(self) -> tuple[Any, Any]:
        """The projector, and the attention module of the tower layer whose output the projector reads.

        Raises:
            ModelError: the family has no such layer.
        """
        layers, index = self.tower_layers()
        return self.base.multi_modal_projector, attention_of(layers[index])

    def tower_attention(self, layer: int | float | None) -> Any:
        """The attention module of a tower layer, named as in `points.TowerLayer`.

        Raises:
            ModelError: there is no such layer.
        """
        layers, index = self.tower_layers()
        if isinstance(layer, float):
            index = max(1, round(layer * len(layers))) - 1
        elif layer is not None:
            index = layer if layer >= 0 else len(layers) + layer
        if not 0 <= index < len(layers):
            raise ModelError(f"the vision tower has layers 0 to {len(layers) - 1}, and no {layer}.")
        return attention_of(layers[index])

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel that the family's processor normalises pixels with.

        Raises:
            ModelError: not known for this tower.
        """
        raise ModelError(f"{type(self.base).__name__} hands its tower no pictures that a matcher could look at.")

    def tower_layers(self) -> tuple[nn.ModuleList, int]:
        """The vision tower's layers, and the number of the one whose output the projector reads.

        Raises:
            ModelError: the family has no such layer.
        """
        raise ModelError(
            f"{type(self.base).__name__} has no vision tower layer with one key per visual token; "
            "use a method that works inside the language model, such as fastv."
        )


class ProjectorAdapter(Adapter):
    """Families built from `vision_tower`, `multi_modal_projector` and `language_model`."""

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        kind = self.config.vision_config.model_type
        for prefix, statistics in PIXELS.items():
            if kind.startswith(prefix):
                return statistics
        raise ModelError(f"it is not known how pixels of a {kind} tower are normalised; use another matcher.")

    def tower_layers(self) -> tuple[nn.ModuleList, int]:
        choice = self.config.vision_feature_layer
        layers = _encoder_layers(self.base.vision_tower)
        if not isinstance(choice, int):
            raise ModelError("the projector reads several vision tower layers; tower methods need a single one.")
        index = (choice if choice >= 0 else len(layers) + 1 + choice) - 1  # hidden state 0 precedes all layers
        if not 0 <= index < len(layers):
            raise ModelError("the projector reads what precedes all vision tower layers; tower methods need a layer.")
        return layers, index


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a tower layer.

    Raises:
        ModelError: it does not make queries and keys of its own.
    """
    attention = getattr(layer, "self_attn", None)
    if not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj")):
        raise ModelError(f"cannot read queries and keys of {type(layer).__name__}.")
    return attention


def _encoder_layers(tower: nn.Module) -> nn.ModuleList:
    encoder = getattr(tower, "encoder", None) or getattr(getattr(tower, "vision_model", None), "encoder", None)
    if encoder is None or not hasattr(encoder, "layers"):
        raise ModelError(f"cannot find the encoder layers of {type(tower).__name__}.")
    return encoder.layers


def square_layout(tokens: int) -> Layout:
    """A square grid of `tokens` patches; one extra leading token is a CLS token without a place.

    Raises:
        ModelError: the tokens form no square.
    """
    side = math.isqrt(tokens)
    if side * side == tokens:
        return Layout.grid(side, side)
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ModelError(f"{tokens} visual tokens form no square grid; this vision tower is not supported.")
    grid = Layout.grid(side, side)
    lead = {"tile": 0, "row": -1, "col": -1, "view": 0, "separator": 0, "line": -1, "source": 0}
    parts = {name: torch.cat([torch.tensor([value]), getattr(grid, name)]) for name, value in lead.items()}
    return Layout(**{**parts, "source": torch.arange(tokens)})
