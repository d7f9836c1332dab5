"""Row policies and patterns: what is not computed equals what is computed and masked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from mmefficient import rows
from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile
from mmefficient.profiles.freeze_order import divergences, order
from tests import tiny
from tests.executor.oracle import logits
from tests.executor.test_identity import fingerprint

PLANS = [
    "shortv(layers=(1, 3))",
    "shortv(layers=all)",
    "skip_ffn(layers=(0, 2))",
    "thin_ffn(ratio=3.0)",
    "saisa",
    "composite",
    "composite(layers=(2,))",
    "no_visual_self(scope=nothing)",
    "no_visual_self(scope=text)",
    "window2d(radius=1,bidirectional=True)",
    "window2d(radius=1,bidirectional=False,layers=(1, 2))",
    "modality_mutual",
    "block_images",
    "random(keep=0.6)+composite",
    "fastv(layer=2,keep=0.5)+shortv(layers=(0, 1, 3))",
    "fastv(layer=2,keep=0.5)+window2d(radius=1,bidirectional=True)",
    "exit(layer=2)+composite",
    "yopo(exit=3,radius=1)",
    "gna(window=3)",
    "fastv(layer=2,keep=0.5)+gna(window=2,stride=2,bidirectional=True)+composite(layers=(0,))",
    "psa(levels=(0,0.4,0.3,0),block=8)",
    "layer_drop(from_layer=2)",
    "random(keep=0.6)+layer_drop(from_layer=1)",
]
CASES = [(f, p) for f in tiny.FAMILIES for p in PLANS if f != "qwen2_5_vl" or "saisa" not in p]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_rows_equal_batch_one_and_hiding_equals_not_computing(family: str, plan: str) -> None:
    model, prompts = tiny.build(family), tiny.ragged_prompts(family)
    batch = tiny.collate(family, prompts)
    stock = logits(model, batch)
    with Plan(plan).apply(model) as run:
        together = logits(model, batch)
    assert not torch.allclose(stock, together, atol=1e-3)
    with Plan(plan).apply(model, mode="simulate"):
        torch.testing.assert_close(together, logits(model, batch), rtol=0, atol=1e-5)
    for row, each in enumerate(prompts):
        with Plan(plan).apply(model):
            alone = logits(model, tiny.collate(family, [each]))[:, 0]
        torch.testing.assert_close(together[:, row], alone, rtol=0, atol=1e-5)
    assert torch.equal(stock, logits(model, batch))
    assert run.report().prefill_flops <= run.report().prefill_flops_without_plan


@pytest.mark.parametrize("plan", ["composite", "shortv(layers=all)", "no_visual_self(scope=nothing)"])
def test_dense_mask_and_blocks_agree(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts of models without grouped heads take torch's attention, others the kernels' package."""
    monkeypatch.setitem(tiny.TEXT, "num_key_value_heads", 4)
    model, batch, found = tiny.build("llava_next"), tiny.ragged_batch("llava_next"), []
    for few in (0, 8192):
        monkeypatch.setattr(rows, "FEW_KEYS", few)
        monkeypatch.setattr(rows, "FEW_KEYS_IDLE", few)
        with Plan(plan).apply(model):
            found.append(logits(model, batch))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_ways_of_generating(way: dict[str, Any]) -> None:
    """Ids are those of the simulation, whatever the cache and however many rows a prompt becomes."""
    model, batch, found = tiny.build("llava"), tiny.ragged_batch("llava"), []
    for mode in ("apply", "simulate"):
        torch.manual_seed(0)
        with Plan("fastv(layer=2,keep=0.5)+composite").apply(model, mode=mode):  # type: ignore[arg-type]
            found.append(model.generate(**batch, max_new_tokens=5, **{"do_sample": False, **way}))
    assert torch.equal(*found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation: str) -> None:
    model, batch = tiny.build("llava_onevision", implementation), tiny.ragged_batch("llava_onevision")
    found = []
    for mode in ("apply", "simulate"):
        with Plan("shortv(layers=(0, 1))+skip_ffn(layers=(2,))").apply(model, mode=mode):  # type: ignore[arg-type]
            found.append(logits(model, batch))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_leaving_restores_the_layers_of_copies_too() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    plain, before = logits(model, batch), fingerprint(model)
    with Plan("composite+thin_ffn").apply(model):
        inside = logits(model, batch)
        twin = copy.deepcopy(model)
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.weight.data.zero_()
        assert not torch.allclose(logits(model, batch), inside)
        assert torch.equal(logits(twin, batch), inside)
        model.load_state_dict(twin.state_dict())
    assert fingerprint(model) == before
    assert torch.equal(logits(model, batch), plain)


def test_rows_without_images() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 0, 2, 5)])
    plain = logits(model, batch)
    with Plan("composite").apply(model):
        assert torch.equal(plain, logits(model, batch))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("shortv(layers=(4,))", "layer 4 is out of range"),
        ("shortv(layers=())", "neither 'all' nor a tuple"),
        ("shortv(layers=(1, 1))", "neither 'all' nor a tuple"),
        ("shortv(layers=(-1,))", "neither 'all' nor a tuple"),
        ("shortv(layers=some)", "none of 'all', a tuple such as"),
        ("shortv(layers=0)", "neither 'all' nor a tuple"),
        ("skip_ffn(layers=3)", "neither 'all' nor a tuple"),
        ("saisa+saisa", "where visual rows come from"),
        ("thin_ffn(ratio=1)", "above 1"),
        ("window2d(radius=-1)", "from 0"),
        ("yopo(exit=2,radius=-1)", "from 0"),
        ("yopo(exit=4)", "out of range"),
        ("no_visual_self(scope=image)", "none of 'self', 'nothing', 'text'"),
    ],
)
def test_bad_plans(plan: str, says: str) -> None:
    with pytest.raises(PlanError, match=says), Plan(plan).apply(tiny.build("llava")):
        pass


def test_other_layers_are_refused() -> None:
    model: Any = tiny.build("llava")
    layer = model.get_decoder().layers[0]
    layer.extra_norm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match="extra_norm"), Plan("composite").apply(model):
        pass
    del layer.extra_norm
    layer.register_forward_hook(lambda module, args, out: 0.2 * out)
    with pytest.raises(ModelError, match="something else"), Plan("composite").apply(model):
        pass
    model.get_decoder().layers[1].mlp.gate_proj = nn.Sequential(nn.Linear(32, 48))
    with pytest.raises(ModelError, match="plain matrices"), Plan("thin_ffn(layers=(1,))").apply(model):
        pass


def test_a_preset_is_its_parts() -> None:
    model, batch, found = tiny.build("llava"), tiny.ragged_batch("llava"), []
    for plan in ("yopo(exit=3,radius=1,ratio=3.0)", "window2d(radius=1)+thin_ffn(ratio=3.0)+exit(layer=3)"):
        with Plan(plan).apply(model):
            found.append(logits(model, batch))
    assert torch.equal(*found)


def test_plans_survive_json() -> None:
    plan = Plan("shortv(layers=(1, 3))+composite")
    assert Plan.from_dict({"methods": [{"name": "shortv", "layers": [1, 3]}, {"name": "composite"}]}) == plan
    assert Plan(str(plan)) == plan == Plan.from_dict(plan.to_dict())


def test_the_order_of_layers_is_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose visual rows change nothing comes first, and a plan may then say how many layers."""
    model: Any = tiny.build("llava")
    still = model.get_decoder().layers[2]
    for linear in (still.self_attn.o_proj, still.mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 5), tiny.prompt("llava", 1, 2, 4)])
    found = divergences(model, [batch])
    assert found[2] == pytest.approx(0, abs=1e-9)
    assert order(found)[0] == 2
    assert all(value > 1e-6 for layer, value in enumerate(found) if layer not in (2, 3))
    with pytest.raises(ModelError, match="no shortv profile"), Plan("shortv(layers=2)").apply(model):
        pass
    profile = Profile.make("shortv", Checkpoint(model, tiny.LAYERS), {"order": order(found)})
    profile.write(tmp_path / "shortv-own.json")
    monkeypatch.setenv("MMEFFICIENT_PROFILES", str(tmp_path))
    with Plan("shortv(layers=2)").apply(model):
        counted = logits(model, batch)
    with Plan(f"shortv(layers={tuple(order(found)[:2])})").apply(model):
        assert torch.equal(counted, logits(model, batch))
    with pytest.raises(PlanError, match="4 layers"), Plan("shortv(layers=5)").apply(model):
        pass
    with pytest.raises(InputError, match="at least one prompt"):
        divergences(model, [])


@pytest.mark.parametrize("plan", ["composite", "shortv(layers=(1,))+skip_ffn(layers=(2,))", "window2d(radius=1)"])
def test_offloaded_weights(plan: str) -> None:
    """accelerate brings weights in around each module's forward, and the check of layers finds them there."""
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with Plan(plan).apply(model):
        expected = logits(model, batch)
    other = cpu_offload(tiny.build("llava"), execution_device=torch.device("cpu"))
    with Plan(plan).apply(other):
        assert torch.equal(expected, logits(other, batch))
    with pytest.raises(ModelError, match="offloaded"), Plan("thin_ffn").apply(other):
        pass


def test_assisted_decoding() -> None:
    model, found = tiny.build("llava"), []
    batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 5)])
    for way in ({}, {"prompt_lookup_num_tokens": 2}):
        with Plan("fastv(layer=2,keep=0.5)+composite").apply(model):
            found.append(model.generate(**batch, max_new_tokens=8, do_sample=False, **way))
    assert torch.equal(*found)
