"""What a ranking kept is compared with how a reference ranks it, and the reference goes on with the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmefficient.bench import engines, gate
from mmefficient.bench.engines import ATTACHED, Runner
from mmefficient.bench.picks import Picks
from mmefficient.errors import MMEfficientError
from mmefficient.plan import Plan
from tests.tiny import build, collate, prompt

PLAN = Plan("fastv(layer=1,keep=0.25)")


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llava")
    engines.prepare(made)
    return made


def inputs() -> dict[str, torch.Tensor]:
    return collate("llava", [prompt("llava", 2, 3, 6), prompt("llava", 1, 5, 4)])


def kept(runner: Runner) -> list[torch.Tensor]:
    assert runner.run is not None
    report = runner.run.report()
    return [report.kept(row, 1) for row in range(2)]


def test_the_reference_keeps_what_it_is_told(model: Any) -> None:
    runner = Runner(model, ATTACHED, PLAN)
    runner.generate(inputs(), 2)
    own = kept(runner)
    assert runner.run is not None
    report = runner.run.report()
    swapped = [until.clone() for until in report.lives_until]
    lost = next(i for i in range(len(swapped[1])) if i not in own[1])
    swapped[1][own[1][0]], swapped[1][lost] = 1, int(report.lives_until[1].max())
    picks = Picks()
    told = Runner(model, ATTACHED, picks.told(PLAN, replace(report, lives_until=tuple(swapped))))
    told.generate(inputs(), 2)
    found = kept(told)
    assert torch.equal(found[0], own[0])
    assert set(found[1].tolist()) == set(own[1].tolist()) - {int(own[1][0])} | {lost}
    assert (picks.kept, picks.swaps) == (sum(map(len, own)), 1)
    assert picks.gap > 0


def test_an_engine_that_ranks_wrongly_gets_no_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (auto,) = engines.choose(["auto"], torch.device("cpu"))
    good, reference = Runner(model, auto, PLAN), Runner(model, ATTACHED, PLAN)
    verdict = gate.compare(good, reference, inputs(), 3)
    assert (verdict.kept > 0, verdict.swaps, verdict.kept_gap) == (True, 0, 0.0)
    own, method = type(PLAN.methods[0]).score, type(PLAN.methods[0])
    right = good.generate

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(method, "score", lambda self, tokens: -own(self, tokens))
            return right(*args, **options)

    monkeypatch.setattr(good, "generate", wrong)
    with pytest.raises(MMEfficientError, match="kept a visual token"):
        gate.compare(good, reference, inputs(), 3)


@pytest.mark.parametrize("plan", ["pool(keep=4)", "random(keep=0.5)+divprune(keep=0.25)", "exit(layer=1)"])
def test_who_does_not_merely_rank_decides_alone(model: Any, plan: str) -> None:
    runner = Runner(model, ATTACHED, Plan(plan))
    runner.generate(inputs(), 1)
    assert runner.run is not None
    picks = Picks()
    Runner(model, ATTACHED, picks.told(runner.plan, runner.run.report())).generate(inputs(), 1)
    assert picks == Picks()
