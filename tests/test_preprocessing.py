"""Pictures are resized on the model's device where the processor can do that, to the same values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmefficient import vlm as module
from mmefficient.bench.preprocess import measure, photo
from mmefficient.images import to_device
from mmefficient.loading import pixel_options
from mmefficient.messages import user_message
from mmefficient.plan import Plan
from mmefficient.vlm import VLM
from tests.tiny import FAMILIES, build
from tests.tiny_checkpoint import processor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_only_torchvision_processors_move() -> None:
    assert pixel_options(processor(), CUDA) == {"device": CUDA}
    assert pixel_options(processor(), CPU) == {}
    pil = SimpleNamespace(image_processor=SimpleNamespace(backend="pil"))
    assert pixel_options(pil, CUDA) == {}
    assert pixel_options(SimpleNamespace(image_processor=object()), CUDA) == {}


def test_a_picture_keeps_its_values_on_the_way() -> None:
    picture = photo((5, 3))
    moved = to_device(picture, CPU)
    assert moved.shape == (3, 3, 5)
    assert tuple(moved[:, 2, 4].tolist()) == picture.getpixel((4, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_give_what_pictures_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLM(build(family), processor(family))
    rows = [[user_message([photo((30, 24)), photo((16, 40), seed=1)], "what is it")], [user_message([], "a dog")]]

    def encode() -> Any:
        return vlm._encode(rows, Plan())

    stock = encode()
    monkeypatch.setattr(module, "pixel_options", lambda *_: {"device": CPU})
    moved = encode()
    assert set(moved) == set(stock)
    for name, value in stock.items():
        torch.testing.assert_close(moved[name], value, msg=name)


def test_what_the_benchmark_says_of_them() -> None:
    found = measure(build("llava"), processor(), [(30, 24)], repeats=1)
    assert found[0]["largest_difference"] == 0
    assert set(found[0]["ms"]) == {"jpeg", "stock", "ours"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_rounds_by_at_most_one_level(family: str) -> None:
    model, made = build(family).to("cuda"), processor(family)
    deviation = min(made.image_processor.image_std)
    for found in measure(model, made, [(640, 480), (33, 200)], repeats=1):
        assert found["largest_difference"] <= 1.01 / 255 / deviation
