"""VisionZip end to end: tower facts against an eager tower, and what is written into the language model's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.plan import Plan
from tests import tiny
from tests.methods.test_reducers import slow_visionzip


def eager_facts(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [N, T, D], attention [N, T] and keys [N, T, d] of the feature layer, from an eager tower."""
    tower = model.model.vision_tower
    choice = model.config.vision_feature_layer
    model.set_attn_implementation({"vision_config": "eager"})
    keys: list[torch.Tensor] = []
    layers = tower.encoder.layers
    index = choice % (len(layers) + 1) - 1  # hidden state 0 precedes all layers
    handle = layers[index].self_attn.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    handle.remove()
    model.set_attn_implementation({"vision_config": "sdpa"})
    probabilities = out.attentions[index].mean(1)
    features = out.hidden_states[choice]
    by_head = keys[0].unflatten(-1, (2, -1)).mean(2)
    if features.shape[1] == 17:  # the class row asks, and is no patch
        return features[:, 1:], probabilities[:, 0, 1:], by_head[:, 1:]
    return features, probabilities.mean(1), by_head


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_language_model_input(family: str) -> None:
    model = tiny.build(family)
    visual, pixels = tiny.visual_ids(family, (32, 32))  # fills four crops
    batch = tiny.collate(family, [([2, 3, 4, *visual, 5, 6], [pixels])])
    crops = batch["pixel_values"].flatten(0, -4)
    features, attention, keys = eager_facts(model, crops)
    given: list[torch.Tensor] = []
    with Plan("visionzip(dominant=5,contextual=3)").apply(model) as run, torch.no_grad():
        layer = model.get_decoder().layers[0]
        handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(**batch)
        handle.remove()
    kept = run.report().kept(0, 0).tolist()
    expected: dict[int, torch.Tensor] = {}
    for crop in range(len(crops)):
        found = slow_visionzip(features[crop], attention[crop], keys[crop], 5, 3)
        expected |= {crop * 16 + place: value for place, value in found.items()}
    order = crop_order(family, len(crops))
    assert kept == sorted(order.index(place) for place in expected)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(torch.stack([expected[order[place]] for place in kept]))
    rows = visual_rows(given[0][0], model, 3, 2)
    torch.testing.assert_close(rows, projected, rtol=0, atol=1e-5)


def crop_order(family: str, crops: int) -> list[int]:
    """Tower patch of each visual token of the picture, in prompt order."""
    if family == "llava":
        return list(range(16))
    side = int((crops - 1) ** 0.5)
    rows = [[1 + r // 4 * side + c // 4 for c in range(4 * side)] for r in range(4 * side)]
    hires = [crop * 16 + r % 4 * 4 + c % 4 for r, row in enumerate(rows) for c, crop in enumerate(row)]
    return list(range(16)) + hires


def visual_rows(hidden: torch.Tensor, model: Any, before: int, after: int) -> torch.Tensor:
    """Rows of the input between the text before and after the picture, line breaks left out."""
    rows = hidden[before : len(hidden) - after]
    newline = getattr(model.model, "image_newline", None)
    return rows if newline is None else rows[~(rows == newline).all(-1)]


def test_sizes_add_up() -> None:
    """Merging hands every patch on; dropping loses it."""
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    for plan, total in (("visionzip(dominant=5,contextual=3)", 16), ("pool(keep=0.3)", 16), ("random(keep=5)", 5)):
        with Plan(plan).apply(model) as run, torch.no_grad():
            model(**batch)
        [state] = run._prompts.values()
        held = state.tokens.visual & state.tokens.alive(0)
        sizes = (state.tokens.size * held).sum(1)
        torch.testing.assert_close(sizes, torch.tensor([1.0, 0.0, 2.0]) * total)
