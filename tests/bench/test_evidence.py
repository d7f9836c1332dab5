"""The evidence table on a tiny model: what is compared, what is written, and what a method that fails does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmefficient as mm
from mmefficient.bench.evidence import accuracy, first_tokens, joined, run, usable, with_times
from mmefficient.bench.evidence_clock import ClockLog
from mmefficient.bench.evidence_page import NOT_BETTER, figure, tables
from mmefficient.bench.evidence_plans import Entry, entries
from mmefficient.bench.result import Target
from mmefficient.errors import InputError
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
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    vlm = VLM.from_pretrained(str(checkpoint), device="cpu")
    folder = tmp_path_factory.mktemp("evidence")
    known = [entry for entry in CHOSEN if not entry.plan.startswith("nothing")]
    first_tokens(known, lambda layers: known, lambda: Target.open(str(checkpoint), "cpu"), (1, 2), 2, "eager", folder)
    parts: list[int] = []
    found = run(CHOSEN, vlm, limit=24, batch_size=12, folder=folder, write=lambda part: parts.append(len(part["rows"])))
    assert parts == [5, 6]  # no plan and a budget's plans, then those that have none
    assert with_times(found, folder) == found
    return found


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
    alone = {**result, "judged_by": {"count": "count/accuracy"}, "headline": "count/accuracy"}
    assert "| count % |" in tables(alone)
    assert len(figure(alone).axes) == 2


def test_cells() -> None:
    """Times count against no plan beside them; of adaptive plans only those that left their budget."""

    def row(plan: str, ms: float, none: float, **changes: Any) -> dict[str, Any]:
        facts = {"plan": plan, "timed": plan, "batch": 1, "engine": "eager", "adaptive": False, "left": 0.5}
        times = {"first": {"median": ms}, "none": {"median": none}, "none_prefill": none, "flops": [1, 2]}
        return {**facts, **times, **changes}

    timed = [row("a()", 5.0, 10.0), row("b()", 5.0, 20.0, adaptive=True), row("c()", 1.0, 2.0, adaptive=True)]
    names = ("a()", "a(,positions=keep)", "b()", "c()")
    plans = [{"plan": plan, "keep": 0.5 if plan < "c" else None} for plan in names]
    found = {each["plan"]: each["clock"].get("1", {}).get("faster") for each in joined(plans, timed)}
    assert found == {"a()": 2.0, "a(,positions=keep)": 2.0, "b()": 4.0, "c()": None}
    assert joined(plans, timed)[0]["clock"]["1"]["realised_ratio"] == 1.0
    assert not joined(plans, [row("b()", 5.0, 20.0, adaptive=True, left=0.4)])[2]["clock"]


def test_times_go_on_where_they_stopped(tmp_path: Path) -> None:
    log = ClockLog(tmp_path, {"model": "m"})
    assert not list(tmp_path.iterdir())
    log.add({"plan": "a", "batch": 1})
    with (tmp_path / "first-token-0.jsonl").open("a") as file:
        file.write('{"plan": "b", "ba')
    again = ClockLog(tmp_path, {"model": "m"}, rank=1)
    assert again.holds("a", 1)
    assert not again.holds("a", 8)
    log = ClockLog(tmp_path, {"model": "m"})
    log.add({"plan": "c", "batch": 8})
    assert ClockLog(tmp_path, {"model": "m"}).rows == [{"plan": "a", "batch": 1}, {"plan": "c", "batch": 8}]
    with pytest.raises(InputError, match="choose another folder"):
        ClockLog(tmp_path, {"model": "n"})


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
