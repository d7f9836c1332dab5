from __future__ import annotations

from pathlib import Path

import pytest

from mmefficient.errors import PlanError
from mmefficient.evaluation import Task, run_eval
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.baselines import budget, matched
from mmefficient.evaluation.markdown import markdown
from mmefficient.methods.reducers.pool import Pool
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

PLANS = ["fastv(layer=1,keep=0.5)", "exit(layer=2)", "visionzip(dominant=3,contextual=1)", "grid(keep=4)"]
RANDOM = [f"random(keep=0.25{seed})" for seed in ("", ",seed=1", ",seed=2")]


def test_a_budget_is_the_mean_share_over_layers() -> None:
    assert budget([Answer("a", "", False, [576, 576, 144, 0], 576, 1, 1)]) == 0.5625
    assert budget([Answer("a", "", False, [3, 3], 9, 1, 1)]) == 0.3333
    assert budget([Answer("a", "", False, [3, 3], 9, 1, 1), Answer("b", "", False, [1, 0], 1, 1, 1)]) == 0.35
    assert budget([Answer("a", "", False, [0, 0], 0, 1, 1)]) == 1


def test_baselines_keep_the_budget_whatever_spends_it(task: Task, vlm: VLM) -> None:
    report = run_eval(task, PLANS, vlm, limit=6, resamples=20)
    found = {plan["plan"]: plan for plan in report["plans"]}
    assert list(found)[: len(PLANS) + 1] == ["none", *(str(Plan(plan)) for plan in PLANS)]
    assert [plan["role"] for plan in report["plans"]] == ["none", *["tested"] * 4, *["baseline"] * (len(found) - 5)]
    for name in PLANS:
        plan = found[str(Plan(name))]
        assert len(plan["rivals"]["random"]) == 3
        for rival in (*plan["rivals"]["random"], *plan["rivals"].get("grid", [])):
            assert found[rival]["visual_tokens"] == pytest.approx(plan["visual_tokens"], abs=0.5)
    assert found["visionzip(dominant=3,contextual=1)"]["rivals"]["random"] == RANDOM
    assert found["grid(keep=4)"]["rivals"].keys() == {"random", "pool"}


def test_no_budget_no_baselines() -> None:
    assert matched(0.0) == matched(1.0) == {}


def test_a_plan_is_not_its_own_rival(task: Task, vlm: VLM) -> None:
    report = run_eval(task, ["random(keep=0.25)"], vlm, limit=3, resamples=20)
    assert [plan["plan"] for plan in report["plans"][1:4]] == RANDOM
    assert report["plans"][1]["rivals"].keys() == {"grid", "pool"}


def test_baselines_can_be_left_out(task: Task, vlm: VLM) -> None:
    report = run_eval(task, PLANS, vlm, limit=3, resamples=20, baselines=False)
    assert len(report["plans"]) == 5
    assert "blind baselines" not in markdown(report)


def test_a_baseline_the_model_cannot_carry_is_named(
    task: Task, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PlanError("no grid here")

    monkeypatch.setattr(Pool, "reduce", refuse)
    report = run_eval(task, ["exit(layer=2)"], vlm, limit=3, resamples=20, out=tmp_path)
    assert report["left_out"] == {"pool(keep=0.5)": "no grid here"}
    assert report["plans"][1]["rivals"].keys() == {"random", "grid"}
    assert "- `pool(keep=0.5)` could not run: no grid here" in (tmp_path / "report.md").read_text()
