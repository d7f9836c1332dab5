"""Scenes follow their own rules: visible objects, themes, and the same draw for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.render import CANVAS, label_map, load_atlas, load_keys
from mmefficient.models.reference.scenes.sample import (
    MAX_COUNT,
    MAX_OBJECTS,
    Dice,
    Scene,
    sample_scene,
    scene_tensors,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(Dice(f"test-sample/{i}")) for i in range(400)]


def test_dice_depend_on_the_seed_alone() -> None:
    assert [Dice("a").below(1000) for _ in range(3)] == [Dice("a").below(1000)] * 3
    dice = Dice(7)
    assert sorted(dice.shuffled(range(50))) == list(range(50))
    share = Counter(dice.weighted([1.0, 4.0]) for _ in range(4000))
    assert share[0] / 4000 == pytest.approx(0.25, abs=0.03)
    assert {dice.between(2, 4) for _ in range(100)} == {2, 3, 4}


def test_scene_limits(scenes: list[Scene]) -> None:
    keys = load_keys()
    for scene in scenes:
        assert 1 <= len(scene.things) <= MAX_OBJECTS
        assert max(len(group) for group in scene.classes.values()) <= MAX_COUNT
        for thing in scene.things:
            assert (thing.w, thing.h) == (keys.widths[thing.key], keys.heights[thing.key])
            x, y = thing.centre
            assert 0 < x < CANVAS
            assert 0 < y < CANVAS
        assert len({(thing.cls, thing.variant) for thing in scene.things}) == len(scene.classes)


def test_every_object_stays_visible(scenes: list[Scene]) -> None:
    """Drawn pixels, not boxes: at least half of what an object would show alone on the canvas is seen."""
    atlas = load_atlas()
    for scene in scenes[:40]:
        layers, _ = scene_tensors([scene])
        index = np.arange(layers.shape[1])[None]
        together = label_map(layers, layers.new_tensor(index), atlas)
        for k in range(layers.shape[1] - len(scene.things) - (scene.word is not None), layers.shape[1]):
            alone = label_map(layers[:, k : k + 1], layers.new_zeros(1, 1), atlas)
            assert (together == k).sum() >= 0.5 * (alone == 0).sum()


def test_objects_come_in_themes(scenes: list[Scene]) -> None:
    def themed(some: list[Scene]) -> float:
        return float(np.mean([s.theme in OBJECTS[thing.cls].themes for s in some for thing in s.things]))

    broken = [sample_scene(Dice(f"test-broken/{i}"), counterfactual=True) for i in range(400)]
    assert themed(scenes) > 0.75
    assert themed(broken) < 0.25


def test_tensors_pad_with_empty_layers(scenes: list[Scene]) -> None:
    layers, background = scene_tensors(scenes[:3], 20)
    assert layers.shape == (3, 20, 3)
    assert background.shape == (3, 8)
    assert (layers[0, len(scenes[0].layers) :, 0] == -1).all()
