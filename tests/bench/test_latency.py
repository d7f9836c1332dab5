"""The latency benchmark times what it says, on models whose random weights are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from mmefficient.bench import latency
from mmefficient.bench.__main__ import app
from mmefficient.bench.floors import Ceilings, measure, median_ms
from mmefficient.bench.presets import prompt, random_model
from mmefficient.errors import MMEfficientError, ModelError

CPU = torch.device("cpu")
PLAN = "fastv(layer=1,keep=0.25)"


def config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=1100
        ),
        image_token_index=1099,
    )


def test_random_models_lack_nothing_but_their_values() -> None:
    ours, built = random_model(config(), CPU, torch.float32), LlavaForConditionalGeneration(config())
    expected = dict(built.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, expected[name], msg=name)
    assert all(0 < p.std() < 0.03 for p in ours.parameters() if p.numel() > 100)


def test_prompts_hold_one_picture_per_row() -> None:
    inputs = prompt(random_model(config(), CPU, torch.float32), 3, text_tokens=9)
    assert inputs["input_ids"].shape == (3, 16 + 9)
    assert ((inputs["input_ids"] == 1099).sum(1) == 16).all()


def test_floors() -> None:
    assert Ceilings(flops=1e12, bandwidth=1e9).floor_ms(2e12, 1e9) == 2000
    assert Ceilings(flops=1e12, bandwidth=1e9).floor_ms(1e9, 1e9) == 1000
    found = measure(CPU, torch.float32)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    calls: list[int] = []
    assert median_ms(lambda: calls.append(1), CPU, 4) >= 0
    assert len(calls) == 7


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "load", lambda *_: random_model(config(), CPU, torch.float32))
    monkeypatch.setattr(latency, "measure", lambda *_: Ceilings(1e12, 1e10))
    path = tmp_path / "results" / "latency.json"
    options = [
        "--plan",
        PLAN,
        "--repeats",
        "2",
        "--new-tokens",
        "3",
        "--batch",
        "1",
        "--batch",
        "2",
        "--out",
        str(path),
    ]
    outcome = CliRunner().invoke(app, ["latency", *options], catch_exceptions=False)
    result = json.loads(path.read_text())
    assert [(row["batch"], row["plan"]) for row in result["rows"]] == [(b, p) for b in (1, 2) for p in ("none", PLAN)]
    assert all(f"`{row['plan']}`" in outcome.output for row in result["rows"])
    none, pruned = result["rows"][:2]
    assert (none["visual_tokens_last_layer"], pruned["visual_tokens_last_layer"]) == (16, 4)
    assert pruned["prefill_flops"] < none["prefill_flops"]
    assert none["realised_ratio"] is None
    saved = 1 - pruned["prefill_flops"] / none["prefill_flops"]
    ratio = (1 - pruned["ms"]["prefill"]["median"] / none["ms"]["prefill"]["median"]) / saved
    assert pruned["realised_ratio"] == pytest.approx(ratio)
    assert result["environment"]["packages"]["torch"]


def test_no_time_is_reported_when_the_empty_plan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config(), CPU, torch.float32)
    answers = iter([torch.zeros(1, 3), torch.ones(1, 3)])
    monkeypatch.setattr(latency, "_generate", lambda *_: next(answers))
    with pytest.raises(MMEfficientError, match="nothing was timed"):
        latency._check(model, prompt(model, 1), 3)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelError):
        latency.run("llava-9000", [], device="cpu")
