"""The latency and throughput benchmarks time what they say, on models whose random weights are complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmefficient.bench import engines, gate, preprocess, result
from mmefficient.bench.cli import app
from mmefficient.bench.engines import Engine, Runner
from mmefficient.bench.floors import Ceilings
from mmefficient.bench.measure import realised
from mmefficient.errors import InputError, MMEfficientError, ModelError, PlanError
from mmefficient.plan import Plan
from tests.tiny import build, collate, prompt
from tests.tiny_checkpoint import save

CPU = torch.device("cpu")
PLAN = "fastv(layer=1,keep=0.25)"
SMALL = ["--repeats", "2", "--new-tokens", "3", "--picture", "24x30", "--batch", "1", "--batch", "2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result.floors, "measure", lambda *_: Ceilings(1e12, 1e10))
    monkeypatch.setattr(preprocess, "SIZES", ((30, 20),))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_latency_writes_what_it_prints(
    family: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mmefficient", "bench", "latency"])
    folder, out = save(tmp_path / family, family), tmp_path / "results"
    outcome = run("latency", "--model", str(folder), "--plan", PLAN, *SMALL, "--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((out / f"latency-{family}.json").read_text())
    assert (found["schema"], found["benchmark"]) == (result.SCHEMA, "latency")
    assert found["command"].startswith("mmefficient")
    assert found["environment"]["packages"]["torch"]
    each = [("hf", "none"), ("eager", "none"), ("auto", "none"), ("eager", PLAN), ("auto", PLAN)]
    expected = [(batch, *one) for batch in (1, 2) for one in each]
    assert [(row["batch"], row["engine"], row["plan"]) for row in found["rows"]] == expected
    assert outcome.stdout.strip() in (out / f"latency-{family}.md").read_text()
    assert (out / f"latency-{family}.png").stat().st_size > 5000
    stock, none, _, pruned, auto = found["rows"][:5]
    assert all(row["check"]["flips"] == 0 for row in found["rows"])
    assert pruned["visual_tokens"][1] == round(pruned["visual_tokens"][0] / 4)
    assert {"preprocess", "vision", "prefill", "first", "decode", "scoring"} == set(pruned["ms"])
    assert "scoring" not in none["ms"]
    assert auto["engine_facts"]["name"] == "graph"
    for stage in ("vision", "prefill", "decode", "first"):
        work = none["work"][stage]
        assert work["over_floor"] * max(work["flops_floor_ms"], work["bytes_floor_ms"]) == pytest.approx(
            none["ms"][stage]["median"]
        )
    assert none["work"] | {"x": 0} != pruned["work"]
    assert pruned["kv_bytes"] < none["kv_bytes"] == stock["kv_bytes"]
    assert stock["speedup"] == {"first": 1, "decode": 1}


def test_throughput_counts_images_and_tokens(tmp_path: Path, quick: None) -> None:
    folder, out = save(tmp_path / "llava"), tmp_path / "results"
    outcome = run("throughput", "--model", str(folder), "--plan", PLAN, *SMALL, "--engine", "eager", "--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((out / "throughput-llava.json").read_text())
    for row in found["rows"]:
        seconds = (row["ms"]["first"]["median"] + 2 * row["ms"]["decode"]["median"]) / 1e3
        assert row["images_per_s"] == pytest.approx(row["batch"] / seconds)
        assert row["tokens_per_s"] == pytest.approx(3 * row["images_per_s"])
    one, two = (row for row in found["rows"] if row["plan"] == "none")
    assert two["kv_bytes"] == 2 * one["kv_bytes"]
    assert (out / "throughput-llava.png").exists()


def inputs() -> dict[str, torch.Tensor]:
    return collate("llava", [prompt("llava", 1, 3, 6), prompt("llava", 1, 5, 4)])


def test_a_wrong_engine_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava")
    engines.prepare(model)
    stock, ours = (Runner(model, engine, Plan()) for engine in engines.choose(["hf", "eager"], CPU))
    verdict = gate.compare(ours, stock, inputs(), 4)
    assert (verdict.tokens, verdict.flips, verdict.gap) == (8, 0, 0.0)
    right = ours.generate
    monkeypatch.setattr(ours, "generate", lambda *args, **options: (right(*args, **options) + 1) % 80)
    with pytest.raises(MMEfficientError, match="not timed"):
        gate.compare(ours, stock, inputs(), 4)
    assert isinstance(gate.verdicts([stock, ours], inputs(), 4)[ours], MMEfficientError)
    monkeypatch.setattr(ours, "generate", lambda *args, **options: right(*args, **options)[:, :2])
    with pytest.raises(MMEfficientError, match="instead of"):
        gate.compare(ours, stock, inputs(), 4)


def test_a_failed_row_has_no_times_and_the_command_fails(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(runner: Runner, *rest: Any) -> Any:
        raise MMEfficientError(f"{runner} is wrong.")

    monkeypatch.setattr(gate, "compare", compare)
    for command in ("latency", "throughput"):
        outcome = run(command, "--model", str(save(tmp_path / "llava")), *SMALL, "--engine", "eager")
        assert outcome.exit_code == 1
        assert "eager none is wrong." in outcome.stdout
        assert "2 of 2 rows failed" in outcome.stderr


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [engine.name for engine in engines.choose(None, CPU)] == [
        e.name for e in engines.ENGINES if e.device in (None, "cpu")
    ]
    assert "hf-static" in [engine.name for engine in engines.choose(None, torch.device("cuda"))]
    with pytest.raises(InputError, match="choose from hf"):
        engines.choose(["hf-static"], CPU)


def test_a_compiled_decode_step_survives_the_plans_of_other_engines() -> None:
    model = build("llava")
    stock = Runner(model, Engine("hf", ""), Plan())
    model.__dict__["_compiled_call"] = compiled = model.forward
    stock.generate(inputs(), 2)
    assert "_compiled_call" not in model.__dict__
    with Plan().apply(model):
        pass
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.__dict__.get("_compiled_call")))
    stock.generate(inputs(), 1)
    assert seen == [compiled]


def test_a_static_cache_keeps_its_place() -> None:
    model = build("llava")
    engines.prepare(model)
    stock, static = Runner(model, Engine("hf", ""), Plan()), Runner(model, Engine("hf-static", "", static=True), Plan())
    expected = stock.generate(inputs(), 5)
    assert torch.equal(static.generate(inputs(), 5), expected)
    (cache,) = static._caches.values()
    place = cache.layers[0].keys.data_ptr()
    assert torch.equal(static.generate(inputs(), 2), expected[:, :2])
    assert torch.equal(static.generate(inputs(), 5), expected)
    assert cache.layers[0].keys.data_ptr() == place
    assert static._caches == {(2, 128): cache}


def test_the_realised_ratio_is_one_when_the_clock_follows_the_arithmetic() -> None:
    def row(flops: float, prefill: float) -> dict[str, Any]:
        ms = {"first": {"median": prefill + 2}, "prefill": {"median": prefill}}
        return {"work": {"prefill": {"flops": flops}}, "ms": ms}

    assert realised(row(25, 2.5), row(100, 10)) == pytest.approx(1)
    assert realised(row(25, 10), row(100, 10)) == 0
    assert realised(row(100, 5), row(100, 10)) is None


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="672x672"):
        run("latency", "--picture", "wide")
    with pytest.raises(ModelError):
        run("latency", "--model", "llava-9000")
    assert run("latency", "--batch", "0").exit_code == run("scaling", "--tokens", "0").exit_code == 2
    with pytest.raises(PlanError, match="fastvv"):  # before the model
        run("latency", "--model", "llava-9000", "--plan", "fastvv(keep=0.5)")
