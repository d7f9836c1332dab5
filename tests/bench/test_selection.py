from __future__ import annotations

import pytest

from mmefficient.bench import selection
from mmefficient.errors import PlanError


def test_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CASES", ((1, 36), (2, 45)))
    plans = ["divprune(keep=0.1111)", *selection.PLANS[5:9]]
    result = selection.run(plans, device="cpu", repeats=1, width=8, tower_width=8)
    names = [row["by"].split("(")[0] for row in result["rows"]]
    assert names == [*selection.OBJECTIVES, "divprune", "prumerge", "prumerge", "hiprune", "trim"] * 2
    assert all(row["shared_picks"] == 1 for row in result["rows"] if "shared_picks" in row)
    assert [row["kept"] for row in result["rows"] if "keep=0.1" in row["by"]] == [4] * 4 + [5] * 4
    assert len(selection.table(result).splitlines()) == len(names) + 1


@pytest.mark.parametrize("plan", ["fastv(layer=2,keep=0.5)", "random(keep=0.5)+random(keep=0.5)", "none"])
def test_refused(plan: str) -> None:
    with pytest.raises(PlanError, match="is not one method"):
        selection.run([plan], device="cpu")
