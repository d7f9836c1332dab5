from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from mmefficient.bench.timers import STAGES, StageTimer, shares

PAUSE = 0.02


class Base(nn.Module):
    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return pixels


class Model(nn.Module):
    """Encodes the image before the prefill (as transformers does from 5.18 on) or inside it (as before)."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.base_model = Base()
        self.inside = inside

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.inside:
            self.base_model.get_image_features(pixels)
        time.sleep(PAUSE)
        return pixels

    def generate(self, steps: int) -> None:
        pixels = torch.zeros(1)
        if not self.inside:
            self.base_model.get_image_features(pixels)
        self(pixels)
        self.inside = False
        for _ in range(steps):
            self(pixels)


@pytest.mark.parametrize("inside", [False, True])
def test_stages_are_told_apart_and_add_up(inside: bool) -> None:
    model = Model(inside)
    start = time.perf_counter()
    with StageTimer(model) as timer:
        with timer.preprocess():
            time.sleep(PAUSE)
        model.generate(steps=3)
    elapsed = (time.perf_counter() - start) * 1e3
    least = PAUSE * 1e3
    assert tuple(timer.stages_ms) == STAGES
    for stage, parts in {"preprocess": 1, "vision": 1, "prefill": 1, "decode": 3}.items():
        assert timer.stages_ms[stage] >= parts * least - 1
    assert timer.stages_ms["decode"] > max(timer.stages_ms[stage] for stage in STAGES[:3])
    assert timer.total_ms == pytest.approx(elapsed, abs=5)
    assert sum(shares(timer.stages_ms).values()) == pytest.approx(1)


def test_two_prompts_are_summed() -> None:
    model = Model(inside=False)
    with StageTimer(model) as timer:
        for _ in range(2):
            with timer.preprocess():
                pass
            model.generate(steps=0)
    assert timer.stages_ms["vision"] >= 2 * PAUSE * 1e3 - 1
    assert timer.stages_ms["prefill"] >= 2 * PAUSE * 1e3 - 1
    assert timer.stages_ms["decode"] < PAUSE * 1e3


def traces(model: nn.Module) -> tuple[Any, ...]:
    return dict(vars(model.base_model)), dict(model._forward_hooks), dict(model._forward_pre_hooks)


def test_nothing_stays_behind_even_after_an_error() -> None:
    model = Model(inside=False)
    before = traces(model)
    with pytest.raises(RuntimeError, match="inside"), StageTimer(model):
        raise RuntimeError("inside")
    assert traces(model) == before


def test_a_wrapper_that_was_there_before_comes_back() -> None:
    model = Model(inside=False)
    model.base_model.get_image_features = own = lambda pixels: pixels  # type: ignore[method-assign, assignment]
    with StageTimer(model) as outer:
        with StageTimer(model) as inner:
            model.generate(steps=0)
        assert inner.stages_ms["vision"] > 0
    assert outer.stages_ms["vision"] > 0
    assert model.base_model.get_image_features is own


def test_an_error_in_the_vision_tower_leaves_the_stage() -> None:
    model = Model(inside=False)
    with StageTimer(model) as timer:
        with pytest.raises(TypeError):
            model.base_model.get_image_features()  # type: ignore[call-arg]
        time.sleep(PAUSE)
    assert timer.stages_ms["prefill"] >= PAUSE * 1e3 - 1


def test_shares_of_nothing_are_zero() -> None:
    assert shares(dict.fromkeys(STAGES, 0.0)) == dict.fromkeys(STAGES, 0.0)
