"""The evidence table on a tiny model: what is compared, what is written, and what a method that fails does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmefficient as mm
from mmefficient.bench.evidence import accuracy, joined, run, usable
from mmefficient.bench.evidence_page import NOT_BETTER, figure, tables
from mmefficient.bench.evidence_plans import Entry, entries
from mmefficient.bench.result import Target
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

CHOSEN = [
    Entry("baselines", "random(keep=0.5)", 0.5),
    Entry("before the language model", "visionzip(dominant=0.4,contextual=0.1)", 0.5),
    Entry("before the language model", "visionzip(dominant=0.4,contextual=0.1,positions=compact)", 0.5),
    Entry("in the language model", "fastv(layer=2,keep=0.5)", 0.5),
    Entry("in the language model", "pact(layer=1,keep=0.8,cutoff=0.3)", 0.5),
    Entry("exit", "exit(layer=2)", None),
    Entry("exit", "dyvte(bias=0.0)", None),
    Entry("exit", "nothing(keep=1)", None),
]


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> dict[str, Any]:
    vlm = VLM.from_pretrained(str(checkpoint), device="cpu")
    options: dict[str, Any] = {"limit": 24, "batch_size": 12, "batches": (1, 2), "repeats": 2}
    return run(CHOSEN, vlm, open_target=lambda: Target.open(str(checkpoint), "cpu"), **options)


def test_every_usable_plan_has_a_row_and_others_a_reason(result: dict[str, Any]) -> None:
    rows = {row["plan"]: row for row in result["rows"]}
    assert list(rows) == ["none", *(str(Plan(CHOSEN[i].plan)) for i in (0, 1, 3, 4, 5))]
    assert set(result["left_out"]) == {"dyvte(bias=0.0)", "nothing(keep=1)"}
    assert "no dyvte profile" in result["left_out"]["dyvte(bias=0.0)"]
    fastv = rows["fastv(layer=2,keep=0.5)"]
    assert (fastv["share"], fastv["keep"]) == (0.75, 0.5)
    assert set(fastv["kinds"]) == set(fastv["paired"]) == set(fastv["against_random"]) == set(result["judged_by"])
    assert rows["random(keep=0.5)"]["against_random"] == {}
    assert set(fastv["clock"]) == {"1", "2"}
    assert fastv["clock"]["1"]["first"]["median"] > 0
    adaptive = next(row for name, row in rows.items() if name.startswith("pact"))
    assert adaptive["clock"] == {}
    assert 0 < adaptive["share"] < 1


def test_the_page(result: dict[str, Any]) -> None:
    text = tables(result)
    for line in ("## Baselines", "## Before the language model", "## In the language model", "## Exit", NOT_BETTER):
        assert line in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| `") or line.startswith("| plan")}
    assert len(widths) == 1
    assert len(figure(result).axes) == 2
    assert len(figure({**result, "clock": {}}).axes) == 1


def test_times_are_compared_within_a_process() -> None:
    def row(plan: str, ms: float) -> dict[str, Any]:
        return {"plan": plan, "batch": 1, "ms": {"first": {"median": ms}}, "realised_ratio": None}

    timed = [row("none", 10.0), row("a", 5.0), row("none", 20.0), row("b", 5.0)]
    found = {
        each["plan"]: each["clock"]["1"]["faster"] for each in joined([{"plan": p} for p in ("none", "a", "b")], timed)
    }
    assert found == {"none": 1.0, "a": 2.0, "b": 4.0}


def test_every_plan_of_the_table_can_be_read(checkpoint: Path) -> None:
    """Of methods that this installation has."""
    known = {method.name for method in mm.methods()}
    for layers in (4, 12, 32):
        for entry in entries(layers):
            if entry.plan.partition("(")[0] in known:
                Plan(entry.plan)
    vlm = VLM.from_pretrained(str(checkpoint), device="cpu")
    few, left_out = usable(entries(4, [0.5]), vlm)
    assert {"baselines", "before the language model", "in the language model", "exit"} == {entry.site for entry in few}
    assert len(few) + len(left_out) <= len(entries(4, [0.5]))
    rows, facts = accuracy(few[:2], vlm, limit=11, batch_size=11)
    assert [row["plan"] for row in rows] == ["none", few[0].plan, few[1].plan]
    assert facts["headline"].startswith("mean/")
