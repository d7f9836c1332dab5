"""The arithmetic of the floors, against what torch counts while a model runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmefficient.bench import floors, presets
from mmefficient.bench.floors import Ceilings, Work
from mmefficient.flops import kv_bytes, layer_flops, stored_flops, token_flops
from mmefficient.plan import Plan
from tests.tiny import LAYERS, TEXT, build, collate, prompt

CPU = torch.device("cpu")
N = 26


def inputs() -> dict[str, torch.Tensor]:
    return collate("llava", [prompt("llava", 1, 3, 6)])


def test_the_larger_floor_counts() -> None:
    ceilings = Ceilings(flops=1e12, bandwidth=1e9)
    assert ceilings.floors_ms(Work(2e12, 1e9)) == (2000, 1000)
    assert ceilings.floor_ms(2e12, 1e9) == 2000
    assert ceilings.floor_ms(1e9, 1e9) == 1000
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "SIDE", {"cpu": 256})
    monkeypatch.setattr(floors, "COPIED", {"cpu": 2**20})
    found = floors.measure(CPU, torch.float32)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    calls: list[int] = []
    assert floors.median_ms(lambda: calls.append(1), CPU, 4) >= 0
    assert len(calls) == 7


def test_prefill_and_decode_are_what_torch_counts() -> None:
    model = build("llava")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(**inputs(), logits_to_keep=1).past_key_values
    work = floors.prefill_work(model, [[N] * LAYERS])
    full = LAYERS * layer_flops(model.config.text_config, N) + 2 * 32 * 100
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model.base_model.get_image_features(inputs()["pixel_values"])
    vision = floors.vision_work(model, inputs())
    assert vision.flops < whole.get_total_flops()  # the last tower layer is not read
    assert full + whole.get_total_flops() == counter.get_total_flops()
    pair, config = 4 * 32, model.config.text_config
    unread = (N - 1) * (token_flops(config) - stored_flops(config)) + pair * (N * N - N)
    # a causal mask leaves half of the pairs
    assert full - work.flops == (LAYERS - 1) * pair * (N * N - N * (N + 1) / 2) + unread
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 1).long(), attention_mask=torch.ones(1, N + 1), past_key_values=cache)
    step = floors.decode_work(model, [[N] * LAYERS])
    assert step.flops == counter.get_total_flops()


def test_bytes_are_weights_and_cache() -> None:
    model = build("llava")
    text = {name: p for name, p in model.named_parameters() if "language_model.layers" in name or "lm_head" in name}
    cache = kv_bytes(model.config.text_config, LAYERS * N, 4)
    assert cache == 2 * LAYERS * N * TEXT["num_key_value_heads"] * 8 * 4
    work = floors.prefill_work(model, [[N] * LAYERS])
    assert work.bytes == sum(p.nbytes for p in text.values()) + cache
    rest = [p for n, p in model.named_parameters() if n not in text and "language_model" not in n]
    assert floors.vision_work(model, inputs()).bytes == sum(p.nbytes for p in rest) + inputs()["pixel_values"].nbytes


def test_a_report_knows_what_the_cache_holds() -> None:
    model = build("llava")
    with Plan("random(keep=4)").apply(model) as run:
        model.generate(**inputs(), max_new_tokens=1)
    assert run.report().stored_tokens == LAYERS * (N - 12)
    with Plan("exit(layer=3)").apply(model, mode="simulate") as run:
        model.generate(**inputs(), max_new_tokens=1)
    assert run.report().stored_tokens == LAYERS * N


def test_random_models_lack_nothing_but_their_values() -> None:
    for family in ("llava", "qwen2_5_vl"):
        built = build(family)
        ours = presets.random_model(built.config, CPU, torch.float32)
        expected = dict(built.named_buffers())
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, expected[name], msg=name)
        assert all(torch.isfinite(p).all() for p in ours.parameters())


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("small", [False, True])
def test_prompts_of_the_presets(name: str, small: bool) -> None:
    processor = presets._processor(name, small)
    config = presets._config(name, processor, small)
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=CPU)
    side = presets.SMALL * (2 if name.startswith("qwen") else 1)
    size = (side, side) if small else presets.PICTURE
    found = presets.prompt(model, processor, 2, pictures=2 if small else 1, size=size)
    visual = presets.visual_tokens(model, found)
    assert found["input_ids"].shape == found["attention_mask"].shape == (2, visual + presets.TEXT_TOKENS)
    assert found["attention_mask"].all()
    assert found["pixel_values"].dtype == torch.bfloat16
    if "next" not in name:
        assert visual == (128 if small else 576)
    elif not small:
        assert visual == 2880 + 48
