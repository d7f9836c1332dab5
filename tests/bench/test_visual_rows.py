"""The table of visual rows: every engine beside the stock model, with and without a plan."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from mmefficient.bench import visual_rows
from tests import tiny


def test_rows_of_engines_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(visual_rows.BACKENDS, "default", SDPBackend.FLASH_ATTENTION)  # a CPU has it too
    config = tiny.build("llava").config
    plans = ["saisa", "composite", "window2d(radius=1)"]
    result = visual_rows.run(
        plans, [1], engines=["auto", "eager"], repeats=1, config=config, device="cpu", dtype=torch.float32
    )
    assert [(row["engine"], row["plan"]) for row in result["rows"]] == [
        ("stock", "none"),
        *((engine, plan) for engine in ("auto", "eager") for plan in ("none", *plans)),
    ]
    for row in result["rows"]:
        assert row["prefill_ms"] > 0
        assert row["visual"] == 16
        assert (row["gap_to_simulation"] or 0) < 1e-3
        assert (row["realised_ratio"] is None) == (row["plan"] in ("none", "window2d(radius=1)"))
    assert "| auto, `saisa` |" in visual_rows.table(result)
