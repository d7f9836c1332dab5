"""The load benchmark tells good answers from wrong ones, and a leak from an allocator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmefficient.bench import load, result
from mmefficient.bench.cli import app
from mmefficient.bench.floors import Ceilings
from mmefficient.errors import InputError
from mmefficient.vlm import VLM
from tests.tiny_checkpoint import save

PLAN = "fastv(layer=1,keep=0.5)"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(result.floors, "measure", lambda *_: Ceilings(1e12, 1e10))
    monkeypatch.setattr(load, "SIZES", ((30, 20), (16, 40)))
    folder = str(save(tmp_path / "llava"))
    numbers = ["--requests", "30", "--concurrency", "3", "--kinds", "3", "--new-tokens", "2"]
    return ["load", "--model", folder, "--plan", PLAN, *numbers, "--out", str(tmp_path / "results")]


def run(command: list[str]) -> tuple[Any, dict[str, Any]]:
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    return outcome, json.loads((Path(command[-1]) / "load-llava.json").read_text())


def test_every_good_request_is_answered_as_alone(command: list[str]) -> None:
    outcome, found = run(command)
    assert outcome.exit_code == 0, outcome.output
    assert found["outcomes"] == {"as alone": 29, "refused": 1}
    assert [row["plan"] for row in found["rows"]] == ["all", "none", PLAN]
    assert found["rows"][0]["requests"] == 30
    ms = found["rows"][0]["ms"]
    assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] <= ms["p99"] * 1.5
    assert len(found["memory"]) == 11
    assert (Path(command[-1]) / "load-llava.png").exists()


def test_wrong_answers_fail(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right, asked = VLM.ask, [0]

    def ask(self: VLM, image: Any, *rest: Any, **options: Any) -> Any:
        asked[0] += 1
        if asked[0] == 20:
            raise RuntimeError("lost")
        answer = right(self, image, *rest, **options)
        if asked[0] > 30:
            object.__setattr__(answer, "text", "something else")
        return answer

    monkeypatch.setattr(VLM, "ask", ask)
    outcome, found = run(command)
    assert outcome.exit_code == 1
    assert found["outcomes"]["RuntimeError: lost"] == 1
    assert found["outcomes"]["answered differently from alone"] >= 5
    assert "answered differently" in found["rows"][0]["failed"]


def test_outcomes() -> None:
    good, bad = load.Request(b"", "?", "none"), load.Request(b"", "?", "none", corrupt=True)

    def refuse(_: load.Request) -> str:
        raise InputError("no picture.")

    assert load._outcome(refuse, bad, {}) == "refused"
    assert "although it is good" in load._outcome(refuse, good, {})
    assert "damaged" in load._outcome(lambda _: "text", bad, {})
    assert load._outcome(lambda _: "text", good, {good: "text"}) == "as alone"


def test_growing_memory_fails(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(100))
    monkeypatch.setattr(load, "_memory", lambda _: {"host": 2**30 + next(sizes) * 2**24, "device": 0})
    outcome, found = run(command)
    assert outcome.exit_code == 1
    assert "host memory grew by" in found["rows"][0]["failed"]
