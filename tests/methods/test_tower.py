"""VisionZip end to end: tower facts against an eager tower, and what is written into the language model's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from mmefficient.plan import Plan
from tests import tiny
from tests.methods.test_before_the_model import slow_hiprune
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


@pytest.mark.parametrize("sizes", [((14, 30), (30, 20)), ((32, 20), (9, 16), (32, 32))])
def test_hiprune_walks_in_crops_of_their_own_width(sizes: tuple[tuple[int, int], ...]) -> None:
    """Pictures of unequal shape in one prompt; where padding is cut off, crops are narrower, each by something else."""
    family, model, keep, alpha = "llava_next", tiny.build("llava_next"), 0.6, 0.9
    ids, pixels, units, before = [2, 3], [], [], 0
    model.set_attn_implementation({"vision_config": "eager"})
    for size in sizes:
        visual, given = tiny.visual_ids(family, size)
        with torch.no_grad():
            maps = model.model.vision_tower(given["pixel_values"][0], output_attentions=True).attentions
        number = torch.arange(len(given["pixel_values"][0]) * 16).view(-1, 4, 4)
        rows, cols = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, 16)
        whole = number[1:].view(rows, cols, 4, 4).transpose(1, 2).reshape(1, rows * 4, cols * 4)
        order = [*range(16), *unpad_image(whole, size).flatten().tolist()]
        for crop in range(len(number)):
            places = [at for at, patch in enumerate(order) if patch // 16 == crop]
            inside = [order[at] % 16 for at in places]
            width = len({patch % 4 for patch in inside})
            middle, late = (maps[layer][crop].mean((0, 1))[1:][inside] for layer in (0, 1))
            units.append(([before + at for at in places], width, middle, late))
        before += len(order)
        ids, pixels = [*ids, *visual, 4], [*pixels, given]
    model.set_attn_implementation({"vision_config": "sdpa"})
    wanted = []
    for places, width, middle, late in units:
        count = max(1, int(keep * len(places) + 0.5))
        wanted += [places[at] for at in slow_hiprune(middle, late, width, count, alpha)]
    assert len({width for _, width, *_ in units}) > 1
    with Plan(f"hiprune(keep={keep},alpha={alpha})").apply(model) as run, torch.no_grad():
        model(**tiny.collate(family, [(ids, pixels), tiny.prompt(family, 0, 2, 5)]))
    assert run.report().kept(0, 0).tolist() == sorted(wanted)


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
