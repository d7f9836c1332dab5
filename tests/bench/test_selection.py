from __future__ import annotations

import pytest

from mmefficient.bench import selection
from mmefficient.errors import PlanError


def test_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CASES", ((1, 36), (2, 45)))
    result = selection.run(["divprune(keep=0.1111)", "scope(keep=4)"], device="cpu", repeats=1, width=8, tower_width=8)
    assert [row["by"] for row in result["rows"]] == [
        "max_min", "coverage", "volume", "divprune(keep=0.1111)", "scope(keep=4,alpha=1.0)"
    ] * 2  # fmt: skip
    assert all(row["shared_picks"] == 1 for row in result["rows"] if "shared_picks" in row)
    assert [row["kept"] for row in result["rows"]] == [4] * 5 + [5, 5, 5, 5, 4]
    assert len(selection.table(result).splitlines()) == 11


@pytest.mark.parametrize("plan", ["fastv(layer=2,keep=0.5)", "random(keep=0.5)+random(keep=0.5)", "none"])
def test_refused(plan: str) -> None:
    with pytest.raises(PlanError, match="is not one method"):
        selection.run([plan], device="cpu")
