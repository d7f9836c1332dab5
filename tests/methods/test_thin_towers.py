"""Towers that give fewer tokens, and what methods ask of other tower layers, against eager computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmefficient.errors import MMEfficientError, ModelError, PlanError
from mmefficient.merging import schedule
from mmefficient.plan import Plan
from mmefficient.points import TowerLayer
from mmefficient.vision import FEATURES, Watcher
from tests import tiny
from tests.methods.test_before_the_model import slow_round
from tests.methods.test_tower import crop_order, visual_rows

FAMILIES = ("llava", "llava_next", "llava_onevision")


def one_picture(family: str) -> tuple[dict[str, Any], torch.Tensor]:
    """A prompt with a picture that fills four crops, and its crops [n, 3, H, W]."""
    visual, pixels = tiny.visual_ids(family, (32, 32))
    batch = tiny.collate(family, [([2, 3, 4, *visual, 5, 6], [pixels])])
    return batch, batch["pixel_values"].flatten(0, -4)


def run(model: Any, batch: dict[str, Any], plan: str) -> tuple[torch.Tensor, list[int]]:
    """Visual rows that enter the language model, and which visual tokens they are."""
    given: list[torch.Tensor] = []
    with Plan(plan).apply(model) as applied, torch.no_grad():
        layer = model.get_decoder().layers[0]
        handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(**batch)
        handle.remove()
    return visual_rows(given[0][0], model, 3, 2), applied.report().kept(0, 0).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("keep", "side", "middles"), [(0.25, 2, [1, 3]), (9, 3, [0, 2, 3]), (1, 1, [2]), (1.0, 4, [0, 1, 2, 3])]
)
def test_smaller_pictures(family: str, keep: float | int, side: int, middles: list[int]) -> None:
    model = tiny.build(family)
    batch, crops = one_picture(family)
    rows, kept = run(model, batch, f"downsample(keep={keep})")
    smaller = F.interpolate(crops, size=(4 * side, 4 * side), mode="bicubic", antialias=True)
    with torch.no_grad():
        tower = model.model.vision_tower(smaller, interpolate_pos_encoding=True, output_hidden_states=True)
        states = tower.hidden_states[model.config.vision_feature_layer][:, -side * side :]
        projected = model.model.multi_modal_projector(states)
    places = [crop * 16 + row * 4 + col for crop in range(len(crops)) for row in middles for col in middles]
    order = crop_order(family, len(crops))
    assert kept == sorted(order.index(place) for place in places)
    wanted = dict(zip(places, projected.flatten(0, 1), strict=True))
    torch.testing.assert_close(rows, torch.stack([wanted[order[place]] for place in kept]), rtol=0, atol=1e-5)


def slow_tower(model: Any, crop: torch.Tensor, counts: list[int]) -> dict[int, torch.Tensor]:
    """Features by patch, of one crop [1, 3, H, W]: layers run one by one on lists of tokens that merge in between."""
    tower, layers = model.model.vision_tower, model.model.vision_tower.encoder.layers
    hidden = tower.embeddings(crop)
    hidden = tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden
    lead = hidden.shape[1] - 16
    homes, size, keys = list(range(-lead, 16)), [1.0] * hidden.shape[1], torch.empty(0)
    for number in range(len(counts)):
        layer = layers[number]
        if number and counts[number - 1] > counts[number]:
            order, merged = slow_round(list(keys), counts[number - 1] - counts[number], bool(lead))
            total = {j: (hidden[0, j] * size[j], size[j]) for j in order}
            for i, j in merged:
                total[j] = (total[j][0] + hidden[0, i] * size[i], total[j][1] + size[i])
            hidden = torch.stack([total[j][0] / total[j][1] for j in order])[None]
            size, homes = [total[j][1] for j in order], [homes[j] for j in order]
        inner = layer.layer_norm1(hidden)
        attention = layer.self_attn
        query, key, value = (
            projection(inner).unflatten(-1, (2, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys = key[0].mean(0)
        logits = query @ key.mT * key.shape[-1] ** -0.5 + torch.tensor(size).log()
        hidden = hidden + attention.out_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return {home: row for home, row in zip(homes, hidden[0], strict=True) if home >= 0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0.5, 11])
def test_merging_between_layers(family: str, keep: float | int) -> None:
    model = tiny.build(family)
    batch, crops = one_picture(family)
    rows, kept = run(model, batch, f"tome(keep={keep},positions=keep)")
    feature_layer = {"llava_onevision": 2}.get(family, 1)
    counts = schedule(16, keep if isinstance(keep, int) else 8, feature_layer)
    expected: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for number, crop in enumerate(crops):
            found = slow_tower(model, crop[None], counts)
            expected |= {number * 16 + place: row for place, row in found.items()}
        order = crop_order(family, len(crops))
        assert kept == sorted(order.index(place) for place in expected)
        projected = model.model.multi_modal_projector(torch.stack([expected[order[place]] for place in kept]))
    torch.testing.assert_close(rows, projected, rtol=0, atol=1e-5)


def test_towers_are_left_as_they_were() -> None:
    model = tiny.build("llava")
    batch, _ = one_picture("llava")
    with torch.no_grad():
        before = model(**batch).logits
        for plan in ("downsample(keep=4)", "tome(keep=0.5)"):
            with Plan(plan).apply(model):
                model(**batch)
            assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    ("family", "plan", "reason"),
    [
        ("qwen2_5_vl", "downsample(keep=0.5)", "smaller pictures"),
        ("qwen2_5_vl", "tome(keep=0.5,positions=keep)", "no vision tower layer"),
        ("llava", "tome(keep=2)", "keep more"),
        ("llava", "downsample(keep=17)", "17"),
        ("llava", "cdpruner(keep=4,matcher='./nowhere')", "no CLIP checkpoint"),
    ],
)
def test_refused(family: str, plan: str, reason: str) -> None:
    context = Plan(plan).apply(tiny.build(family))
    with pytest.raises(MMEfficientError, match=reason):
        context.__enter__()


@pytest.mark.parametrize(
    "plan",
    ["downsample(keep=4)+fastervlm(keep=2)", "fastervlm(keep=8)+tome(keep=0.5)", "random(keep=8)+downsample(keep=4)"],
)
def test_a_thinner_tower_has_no_facts_for_others(plan: str) -> None:
    with pytest.raises(PlanError, match="tower"):
        Plan(plan)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["class", "all"])
@pytest.mark.parametrize("joined", [False, True])
def test_facts_of_any_layer(family: str, rows: Any, joined: bool) -> None:
    model = tiny.build(family)
    batch, crops = one_picture(family)

    class Asks:
        needs, watches = frozenset({"tower"}), True
        tower_layers = (TowerLayer(0.7, rows, joined), TowerLayer(-1, rows, joined), TowerLayer(None, "all"))

    from mmefficient.models import adapter_for

    watcher = Watcher(adapter_for(model), [Asks()])  # type: ignore[list-item]
    undo = watcher.attach()
    with torch.no_grad():
        model(**batch)
    for step in undo:
        step()
    tower = watcher.take()["image"].tower
    assert tower is not None
    indices = (1, 2, {"llava_onevision": 2}.get(family, 1))
    with torch.no_grad():
        states = model.model.vision_tower(crops, output_hidden_states=True).hidden_states
        for layer, index in zip(Asks.tower_layers, indices, strict=True):
            module = model.model.vision_tower.encoder.layers[index]
            inner = module.layer_norm1(states[index])
            heads = 1 if layer.joined else 2
            query, key = (
                projection(inner).unflatten(-1, (heads, -1)).transpose(1, 2)
                for projection in (module.self_attn.q_proj, module.self_attn.k_proj)
            )
            lead = inner.shape[1] - 16
            asking = query[:, :, :1] if lead and layer.rows == "class" else query
            wanted = (asking @ key.mT * key.shape[-1] ** -0.5).softmax(-1).mean((1, 2))[:, lead:]
            torch.testing.assert_close(tower.layers[layer].attention, wanted.flatten())
            torch.testing.assert_close(tower.layers[layer].keys, key.mean(1)[:, lead:].flatten(0, 1))
    assert FEATURES in tower.layers


def test_layers_that_do_not_exist() -> None:
    from mmefficient.models import adapter_for

    with pytest.raises(ModelError, match="layers 0 to 2, and no 3"):
        adapter_for(tiny.build("llava")).tower_attention(3)
