from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mmefficient.evaluation import Kind, Task
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.markdown import markdown
from mmefficient.evaluation.metrics.chair import Lexicon, chair
from mmefficient.evaluation.report import PlanRun, build


def answer(name: str, text: str, kept: int, flops: float) -> Answer:
    return Answer(name, text, False, [kept], 16, flops, 100.0, {"prefill": 3.0, "decode": 2.0}, 5.0)


@pytest.fixture
def report(task: Task) -> dict[str, Any]:
    """Seven existence and seven colour questions; the plan gets two colours and no existence question wrong."""
    records = task.records(["existence", "colour"], None)
    right = [answer(record.id, record.truth[0], 16, 100) for record in records]
    worse = [answer(a.id, "blue" if a.id in ("c0", "c5") else a.text, 4 + i % 2, 30) for i, a in enumerate(right)]
    runs = [PlanRun("none", right), PlanRun("exit(layer=1)", worse, checked=4, flips=["c0"])]
    settings = {"digest": "d", "max_new_tokens": {"colour": 3}}
    return build(task, records, runs, settings=settings, environment={"gpus": []}, resamples=500, seed=0)


def test_values_and_paired_differences(report: dict[str, Any]) -> None:
    none, plan = report["plans"]
    assert none["metrics"]["colour/accuracy"] == {"value": 1, "low": 1, "high": 1, "n": 7}
    assert plan["metrics"]["colour/accuracy"]["value"] == pytest.approx(5 / 7)
    assert plan["paired"]["colour/accuracy"]["value"] == pytest.approx(-2 / 7)
    assert plan["paired"]["existence/accuracy"] == {"value": 0, "low": 0, "high": 0, "n": 7}
    assert plan["metrics"]["mean/accuracy"]["value"] == pytest.approx((1 + 5 / 7) / 2)
    assert plan["paired"]["mean/accuracy"]["value"] == pytest.approx(-1 / 7)
    assert plan["paired"]["mean/accuracy"]["n"] == 14


def test_lost_and_gained_answers_are_counted(report: dict[str, Any]) -> None:
    tests = report["plans"][1]["mcnemar"]
    assert tests == {
        "existence/accuracy": {"lost": 0, "gained": 0, "p": 1.0},
        "colour/accuracy": {"lost": 2, "gained": 0, "p": 0.5},
    }
    assert report["headline"] == "mean/accuracy"


def rivals(task: Task, better: bool, kind: str = "colour") -> dict[str, Any]:
    """A plan, always right, beside three seeds of which one (or, if not `better`, none) is always wrong."""
    records = task.records([kind], None)
    right = [answer(record.id, " and ".join(record.truth[:1]), 16, 100) for record in records]
    wrong = [answer(record.id, "cat, dog and hot dog", 4, 100) for record in records]
    task = dataclasses.replace(
        task, kinds={**task.kinds, "caption": Kind(9, chair(Lexicon(dict.fromkeys(("cat", "dog", "hot dog"), ()))))}
    )
    seeds = [PlanRun("r0", wrong if better else right), PlanRun("r1", right), PlanRun("r2", right)]
    runs = [PlanRun("none", right), PlanRun("p", right, rivals={"random": ["r0", "r1", "r2"]}), *seeds]
    settings = {"digest": "d"}
    return build(task, records, runs, settings=settings, environment={}, resamples=50, seed=0, tested=2)


@pytest.mark.parametrize(("better", "verdict"), [(True, "better"), (False, "equal")])
def test_a_plan_has_to_beat_the_mean_of_the_random_seeds(task: Task, better: bool, verdict: str) -> None:
    report = rivals(task, better)
    entry = report["plans"][1]["against"]["random"]["colour/accuracy"]
    assert entry["value"] == pytest.approx(1 / 3 if better else 0)
    assert entry["verdict"] == verdict
    assert ("**not better**" in markdown(report).split("Baselines keep")[0]) == (not better)


def test_less_can_be_better(task: Task) -> None:
    entry = rivals(task, True, "caption")["plans"][1]["against"]["random"]["caption/chair_s"]
    assert (entry["value"], entry["verdict"]) == (pytest.approx(-1 / 3), "better")


def test_costs_are_means_over_questions(report: dict[str, Any]) -> None:
    plan = report["plans"][1]
    assert plan["visual_tokens"] == 4.5
    assert plan["visual_tokens_without_plan"] == 16
    assert plan["prefill_flops_ratio"] == 0.3
    assert plan["seconds"] == 0.07
    assert plan["ms_per_question"] == {"prefill": 3.0, "decode": 2.0}
    assert plan["flips"] == {"checked": 4, "flipped": 1, "ids": ["c0"]}


def test_undefined_values_are_null_in_json_and_dashes_in_markdown(task: Task) -> None:
    records = task.records(["existence"], 1)  # one question whose answer is no: recall has no denominator
    runs = [PlanRun(name, [answer("e0", "no", 16, 100)]) for name in ("none", "exit(layer=1)")]
    report = build(task, records, runs, settings={"digest": "d"}, environment={}, resamples=50, seed=0)
    assert report["plans"][0]["metrics"]["existence/recall"] == {"value": None, "low": None, "high": None, "n": 1}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert "| existence/recall | 1 | – | – |" in markdown(report)


def test_markdown_prints_percent_and_marks_noise(report: dict[str, Any]) -> None:
    page = markdown(report)
    assert "| metric | n | `none` | `exit(layer=1)` |" in page
    assert "| `exit(layer=1)` | 4.5 of 16.0 | 30.0 % | 0.1 | 200.0 | 1 of 4 |" in page
    changes, values, differences = [line for line in page.splitlines() if line.startswith("| colour/accuracy")]
    assert changes == "| colour/accuracy | −2 +0, p 0.5 |"
    assert "| 100.0 [100.0, 100.0] | 71.4 [" in values
    assert "| −28.6 [" in differences
    low, high = (report["plans"][1]["paired"]["colour/accuracy"][key] for key in ("low", "high"))
    assert differences.endswith("~ |") == (low <= 0 <= high)
    assert "| existence/accuracy | +0.0 [+0.0, +0.0] ~ |" in page
    assert "- max_new_tokens: colour 3" in page
    assert "- gpus: none" in page
