"""What plans add to every token on a model of real size: the clock of the hallucination table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmefficient.bench import latency
from mmefficient.bench.result import Target
from mmefficient.errors import InputError
from mmefficient.plan import Plan

HEADS = "adhh(heads=((16,29),(26,9),(13,31),(15,10),(20,12)))"
"""Stands for `adhh`, whose heads are those of a profile; random weights have none."""


def timed(plan: str) -> str:
    """What is timed for a plan of the table."""
    return HEADS if [method.name for method in Plan(plan).methods] == ["adhh"] else plan


def measure(
    plans: Sequence[str], model: str, file: Path, *, repeats: int = 6, device: str, dtype: str
) -> dict[str, Any]:
    """Times of `plans` at batch 1 (`latency.run`): recorded, or attached where the graph engine cannot run a plan.

    What `file` has is not timed again; it is written after either engine.

    Raises:
        InputError: the file has times of another model.
    """
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if result.get("model", model) != model:
        raise InputError(f"{file} was measured with {result['model']}, not {model}; choose another folder.")
    lacking = [plan for plan in plans if str(Plan(timed(plan))) not in added(result["rows"])]
    if not lacking:
        return result
    target = Target.open(model, device, dtype)
    for engine in ("graph" if target.model.device.type == "cuda" else "auto", "eager"):
        todo = [timed(plan) for plan in lacking if str(Plan(timed(plan))) not in added(result["rows"])]
        if todo:
            found = latency.run(target, todo, engines=[engine], repeats=repeats)
            result = {**found, "rows": [*result["rows"], *found["rows"]]}
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def added(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Milliseconds per token over no plan on the same engine, and as a share of its, by timed plan."""
    found: dict[str, str] = {}
    base = 0.0
    for row in rows:  # every run starts with no plan
        if "failed" in row:
            continue
        ms = row["ms"]["decode"]["median"]
        if row["plan"] == "none":
            base = ms
        else:
            attached = ", attached" if row["engine"] == "eager" else ""
            found[row["plan"]] = f"{ms - base:+.2f} ({round(100 * (ms / base - 1)):+d} %{attached})"
    return found
