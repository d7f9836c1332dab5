"""The hallucination task, and how the benchmark chooses strengths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmefficient.bench import hallucination_clock
from mmefficient.bench.hallucination import STRENGTHS, broken, choose, table
from mmefficient.errors import InputError
from mmefficient.evaluation.metrics.pope import COUNTS
from mmefficient.evaluation.tasks import get
from mmefficient.evaluation.tasks.hallucination import KINDS, task
from mmefficient.models.reference.scenes import splits
from mmefficient.plan import Plan


def test_kinds_and_their_scenes() -> None:
    assert get("hallucination").name == "hallucination"
    records = task("val").records(None, 3)
    assert [record.kind for record in records] == [kind for kind in KINDS for _ in range(3)]
    assert len({record.id for record in records}) == len(records)
    captions = [record for record in records if record.kind == "caption-counterfactual"]
    for record in captions:
        assert record.picture.startswith("val/counterfactual/")
        assert isinstance(record.source, splits.Question)
        assert set(record.truth) == set(record.source.scene.names)
    assert set(task("test").kinds) == set(KINDS)


def test_the_new_kind_leaves_the_fixed_sets_alone() -> None:
    assert "caption-counterfactual" not in splits.KINDS
    assert {question.kind for question in splits.load("val", limit=1)} == set(splits.KINDS)


def metrics(chair: float, recall: float = 0.9, length: float = 8.0, repeats: float = 0.0, right: float = 0.9) -> Any:
    caption = {"chair_s": chair, "recall": recall, "length": length, "repeated_8gram": repeats}
    found = {f"caption-counterfactual/{name}": {"value": value} for name, value in caption.items()}
    return {**found, "existence-counterfactual/accuracy": {"value": right}}


@pytest.mark.parametrize(
    ("tried", "chosen"),
    [
        ({"a": metrics(0.2), "b": metrics(0.1)}, ("b", True)),
        ({"a": metrics(0.2), "b": metrics(0.1, recall=0.891)}, ("a", True)),
        ({"a": metrics(0.2), "b": metrics(0.1, length=7.66)}, ("a", True)),
        ({"a": metrics(0.2), "b": metrics(0.1, recall=0.893, length=7.7)}, ("b", True)),
        ({"a": metrics(0.2), "b": metrics(0.1, repeats=0.01)}, ("a", True)),
        ({"a": metrics(0.1), "b": metrics(0.1, right=0.95)}, ("b", True)),
        ({"a": metrics(0.1, recall=0.5), "b": metrics(0.2, recall=0.8)}, ("b", False)),
        ({"a": metrics(0.1, repeats=0.06), "b": metrics(0.2, recall=0.86)}, ("b", False)),
    ],
)
def test_strengths_are_chosen_among_those_that_keep_the_captions(tried: Any, chosen: tuple[str, bool]) -> None:
    assert choose(metrics(0.3), tried) == chosen


def test_captions_that_come_apart() -> None:
    base = metrics(0.3, recall=0.95, repeats=0.01)
    assert broken(base, metrics(0.0, recall=0.89))
    assert broken(base, metrics(0.0, recall=0.95, repeats=0.07))
    assert not broken(base, metrics(0.5, recall=0.91, repeats=0.05, length=20.0))


def test_every_strength_is_a_plan() -> None:
    for name, plans in STRENGTHS.items():
        assert len(set(plans)) == len(plans)
        assert all([method.name for method in Plan(plan).methods] == [name] for plan in plans)


def test_table() -> None:
    entry = {"plan": "none", "metrics": {"caption-counterfactual/chair_s": {"value": 0.25}}, "paired": {}}
    changed: dict[str, Any] = {
        "plan": str(Plan("pai")),
        "metrics": {"caption-counterfactual/chair_s": {"value": 0.125}},
        "paired": {"caption-counterfactual/chair_s": {"low": -0.2, "high": -0.1}},
    }
    counts = zip(COUNTS, (9.0, 2.0, 8.0, 1.0), strict=True)
    changed["metrics"] |= {f"existence-counterfactual/{name}": {"value": value} for name, value in counts}
    result: dict[str, Any] = {"chosen": {"pai": "pai"}, "feasible": {"pai": False}, "test": {"plans": [entry, changed]}}
    text = table(result)
    assert "ms per token" not in text
    assert "25.0" in text
    assert "12.5 (-20.0 to -10.0)" in text
    assert "` *" in text
    assert "| 9/2/8/1 |" in text
    result["clock"] = {"rows": [timing("graph", "none", 4.0), timing("graph", str(Plan("pai")), 4.1)]}
    assert table(result).splitlines()[-1].endswith("| +0.10 (+2 %) |")


def timing(engine: str, plan: str, ms: float | None) -> dict[str, Any]:
    row = {"engine": engine, "plan": str(Plan(plan))}
    return {**row, "failed": "no"} if ms is None else {**row, "ms": {"decode": {"median": ms}}}


def test_the_clock_times_attached_what_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def run(target: Any, plans: list[str], *, engines: list[str], repeats: int) -> dict[str, Any]:
        asked.append((engines[0], plans))
        recorded = engines[0] == "auto"
        cost = {plan: None if recorded and plan.startswith("vcd") else 20.0 for plan in plans}
        return {"model": "m", "rows": [timing(engines[0], plan, ms) for plan, ms in {"none": 10.0, **cost}.items()]}

    target = SimpleNamespace(model=torch.nn.Linear(1, 1))
    target.model.device = torch.device("cpu")
    monkeypatch.setattr(hallucination_clock.Target, "open", lambda *_: target)
    monkeypatch.setattr(hallucination_clock.latency, "run", run)
    options: dict[str, Any] = {"device": "cpu", "dtype": "auto"}
    found = hallucination_clock.measure(["lift", "vcd"], "m", tmp_path / "clock.json", **options)
    assert [engine for engine, _ in asked] == ["auto", "eager"]
    expected = {str(Plan("lift")): "+10.00 (+100 %)", str(Plan("vcd")): "+10.00 (+100 %, attached)"}
    assert hallucination_clock.added(found["rows"]) == expected
    again = hallucination_clock.measure(["vcd", "lift"], "m", tmp_path / "clock.json", **options)
    assert again == found
    assert len(asked) == 2
    hallucination_clock.measure(["vcd", "adhh"], "m", tmp_path / "clock.json", **options)
    assert asked[2:] == [("auto", [hallucination_clock.HEADS])]
    with pytest.raises(InputError, match="measured with m"):
        hallucination_clock.measure(["lift"], "other", tmp_path / "clock.json", **options)
