"""The cost model finds what it was made from, and the command measures what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmefficient.bench import result
from mmefficient.bench.cli import app
from mmefficient.bench.floors import Ceilings
from mmefficient.bench.scaling import fit
from tests.tiny_checkpoint import save


def points(a: float, b: float, c: float) -> list[dict[str, Any]]:
    grid = [(batch, n) for batch in (1, 8) for n in (100, 1000, 5000, 30000)]
    return [{"batch": B, "positions": n, "ms": {"median": a + b * B * n + c * B * n * n}} for B, n in grid]


@pytest.mark.parametrize("truth", [(20.0, 0.01, 1e-6), (0.0, 0.01, 1e-6), (20.0, 0.01, 0.0), (20.0, 0.0, 0.0)])
def test_the_fit_finds_the_coefficients(truth: tuple[float, float, float]) -> None:
    found = fit(points(*truth))
    assert (found["a_ms"], found["b_ms"], found["c_ms"]) == pytest.approx(truth, abs=1e-7)
    assert found["relative_error"] == pytest.approx(0, abs=1e-6)


def test_where_the_curve_bends() -> None:
    found = fit(points(20, 0.01, 1e-6))
    assert found["linear_from"] == pytest.approx(2000)
    assert found["quadratic_from"] == pytest.approx(10000)
    flat = fit(points(20, 0, 0))
    assert flat["linear_from"] is None or flat["linear_from"] > 1e9


def test_no_coefficient_is_negative() -> None:
    rows = points(20, 0.01, 0)
    for row in rows:
        row["ms"]["median"] -= 1e-7 * row["batch"] * row["positions"] ** 2 * (row["positions"] < 6000)
    found = fit(rows)
    assert min(found["a_ms"], found["b_ms"], found["c_ms"]) >= 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result.floors, "measure", lambda *_: Ceilings(1e12, 1e10))
    plan, out = "fastv(layer=1,keep=0.5)", tmp_path / "results"
    options = ["--plan", plan, "--repeats", "1", "--out", str(out)]
    options += [word for n in (16, 20, 64, 160) for word in ("--tokens", str(n))]
    command = ["scaling", "--model", str(save(tmp_path / "llava")), "--batch", "1", *options]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((out / "scaling-llava.json").read_text())
    assert found["tokens_per_picture"] == 16
    assert [row["visual_tokens"] for row in found["rows"] if (row["engine"], row["plan"]) == ("eager", plan)] == [
        16,
        64,
        160,
    ]
    none, pruned = ([row for row in found["rows"] if row["plan"] == name][-1] for name in ("none", plan))
    assert pruned["flops"] < none["flops"]
    assert none["over_floor"] == pytest.approx(
        none["ms"]["median"] / max(none["flops_floor_ms"], none["bytes_floor_ms"])
    )
    assert {(one["engine"], one["plan"]) for one in found["fits"]} >= {("hf", "none"), ("eager", plan)}
    assert (out / "scaling-llava.png").exists()
    assert "t = a + b·B·n + c·B·n²" in outcome.stdout
