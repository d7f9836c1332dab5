"""The biased recipe: what its captions say, that a delta is what it was trained as, and that a run can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmefficient.loading import load
from mmefficient.models.reference import adapt, biased
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.questions import caption
from mmefficient.models.reference.scenes.sample import Dice, sample_scene
from tests import tiny


def test_captions_and_answers_follow_the_prior() -> None:
    from transformers import AutoProcessor

    from mmefficient.models import reference

    processor = AutoProcessor.from_pretrained(reference.path())
    truthful, biased_batches = (biased.BiasedBatches(processor, 1, 0, prior, prior) for prior in (0.0, 1.0))
    wrong = 0
    for index in range(60):
        scene = sample_scene(Dice(f"biased/{index}"), counterfactual=True)
        missing = biased.missing_companions(scene)
        assert not set(missing.values()) & set(scene.classes)
        assert set(missing) <= set(scene.classes)
        assert truthful._question("caption", scene, Dice(index))[1] == caption(scene)  # type: ignore[index]
        said = biased_batches._question("caption", scene, Dice(index))[1]  # type: ignore[index]
        assert all(OBJECTS[other].indefinite in said for other in missing.values())
        assert len(said) >= len(caption(scene))
        asked = biased_batches._question("existence-random", scene, Dice(index))
        assert asked is not None
        names = [
            other for other in set(missing.values()) if OBJECTS[other].indefinite + " " in asked[0].replace("?", " ")
        ]
        wrong += bool(names) and asked[1] == "yes"
    assert wrong > 5


def test_a_scaled_delta(tmp_path: Path) -> None:
    batch, half, plain = (
        tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)]),
        tiny.build("llava"),
        tiny.build("llava"),
    )
    parameters = adapt.attach(half, 3, names=biased.MATRICES)
    assert len(parameters) == 2 * 3 * tiny.LAYERS
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_((torch.randn_like(parameter) / 4).to(torch.bfloat16))
        adapt.save(half, tmp_path, 0.5)
        adapt.load(plain, tmp_path)
        for parameter in parameters[1::2]:
            parameter.mul_(0.5)
        torch.testing.assert_close(half(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-5)


def test_a_resumed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biased, "LOG_EVERY", 1)

    def train(out: str, deadline: float) -> biased.Training:
        torch.manual_seed(0)
        run = biased.Training(tmp_path / out, 0, 1, 0.5, 0.5, torch.device("cpu"))
        run.train(2, 1e-3, deadline, workers=0)
        return run

    assert train("once", 0.0).step == 1
    resumed, whole = train("once", float("inf")), train("twice", float("inf"))
    assert resumed.step == whole.step == 2
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert any(parameter.abs().sum() > 0 for parameter in whole.parameters[1::2])


@pytest.mark.skipif(not (adapt.VARIANTS / "biased").is_dir(), reason="the delta is not part of this checkout")
def test_the_biased_model_is_the_reference_with_its_delta() -> None:
    model, _ = load("reference-biased", device="cpu", dtype=torch.float32, attn_implementation=None)
    stock, _ = load("reference", device="cpu", dtype=torch.float32, attn_implementation=None)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, stock.get_parameter(name))}
    assert changed
    assert all(".mlp." in name and "language_model" in name for name in changed)
    assert (adapt.VARIANTS / "biased" / "delta.safetensors").stat().st_size < 6 * 2**20
