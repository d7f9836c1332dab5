"""Time to the first token of the plans in the evidence table, noted plan by plan: a run that was stopped goes on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmefficient.bench.engines import ATTACHED, Engine, Runner
from mmefficient.bench.floors import wall_ms
from mmefficient.bench.measure import realised, spread
from mmefficient.bench.presets import prompt
from mmefficient.bench.result import Target
from mmefficient.bench.timers import StageTimer
from mmefficient.errors import InputError, MMEfficientError, ModelError
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint

Row = dict[str, Any]
WARM_UP = {"eager": 1}
"""Rounds of a plan that are not timed; 3 on other engines, which compile or capture. Of no plan one, if it is warm."""

SAME = 0.005
"""By how much the share that a plan leaves on random weights may miss its budget."""


class ClockLog:
    """Rows on disk: one JSON line each after a line that says what was measured on.

    Attributes:
        about: model, engine, dtype, device, repeats; rows: of all processes, of earlier runs too.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any], rank: int = 0) -> None:
        """Without a folder nothing is written.

        Raises:
            InputError: the folder holds times of another model or device.
        """
        self.about = dict(about)
        self._path = None if folder is None else folder / f"first-token-{rank}.jsonl"
        self.rows: list[Row] = []
        for path in files(folder):
            found, rows = read(path)
            if found != self.about:
                raise InputError(f"{path} was measured with {found}, not {self.about}; choose another folder.")
            self.rows += rows
            if path == self._path:  # without a line that a kill cut off
                _append(path, [found, *rows], "w")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, [row] if self._path.exists() else [self.about, row], "a")

    def holds(self, plan: str, batch: int) -> bool:
        return any((row["plan"], row["batch"]) == (plan, batch) for row in self.rows)


def files(folder: Path | None) -> list[Path]:
    """Where the times of all processes are."""
    return [] if folder is None else sorted(folder.glob("first-token-*.jsonl"))


def _append(path: Path, lines: Sequence[Row], mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What a file says it was measured on, and its rows; a line that a kill cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    about, *rows = (json.loads(line) for line in lines if line.endswith("\n"))
    return about, rows


def measure(
    pairs: Sequence[tuple[str, str]],
    target: Target,
    batches: Sequence[int],
    repeats: int,
    engine: Engine,
    log: ClockLog,
) -> None:
    """Time every plan that the log lacks beside the empty one, in turns; `engine` where it runs, else attached.

    Args:
        pairs: plan of the table, and what is timed for it on a model of this depth.
    """
    inputs = {batch: prompt(target.model, target.processor, batch) for batch in batches}
    layers = len(target.model.get_decoder().layers)
    prefill: dict[tuple[str, int], float] = {}
    for plan, text in pairs:
        for batch in batches:
            if log.holds(plan, batch):
                continue
            for each in [engine] if engine.name == ATTACHED.name else [engine, ATTACHED]:
                try:
                    warm = (each.name, batch) in prefill
                    row = _time(Plan(text), target, inputs[batch], repeats, each, layers, warm)
                    if (each.name, batch) not in prefill:
                        prefill[each.name, batch] = _prefill(target, inputs[batch], repeats, each)
                except ModelError:  # the engine cannot run it
                    continue
                except MMEfficientError:  # no profile for random weights, or not on this family
                    break
                log.add({"plan": plan, "timed": text, "batch": batch, "none_prefill": prefill[each.name, batch], **row})
                break


def _time(
    plan: Plan,
    target: Target,
    inputs: Mapping[str, torch.Tensor],
    repeats: int,
    engine: Engine,
    layers: int,
    warm: bool,
) -> Row:
    model, device = target.model, target.model.device
    stages = [stage for method in plan.methods for stage in method.stages(Checkpoint(model, layers))]
    none, own = Runner(model, engine, Plan()), Runner(model, engine, plan)
    ms: dict[Runner, list[float]] = {none: [], own: []}
    for index in range(-WARM_UP.get(engine.name, 3), repeats):
        for runner, found in ms.items():
            if runner is none and warm and index < -1:
                continue
            took = wall_ms(partial(runner.generate, inputs, 1), device)
            if index >= 0:
                found.append(took)
    with plan.apply(model, **engine.apply) as run:
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
    report = run.report()
    kept = [row.kept_per_layer for row in report.rows]
    total = sum(row.visual_total for row in report.rows)
    return {
        "engine": engine.name,
        "adaptive": any(getattr(stage, "adaptive", False) for stage in stages),
        "first": spread(ms[own]),
        "none": spread(ms[none]),
        "flops": [report.prefill_flops, report.prefill_flops_without_plan],
        "left": sum(row[-1] for row in kept) / total,
    }


def _prefill(target: Target, inputs: Mapping[str, torch.Tensor], repeats: int, engine: Engine) -> float:
    """Median of the stage without a plan."""
    found = []
    for _ in range(repeats):
        with StageTimer(target.model) as timer:
            Runner(target.model, engine, Plan()).generate(inputs, 1)
        found.append(timer.stages_ms["prefill"])
    return statistics.median(found)


def entries_of(rows: Sequence[Row], budgets: Mapping[str, float | None]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Plan, batch and cell of every row that says something about the plan of the table.

    What stays under an adaptive plan depends on the picture, and pictures mean nothing to random weights: its time
    counts only if it left the budget.
    """
    for row in rows:
        budget = budgets.get(row["plan"])
        if row["adaptive"] and (budget is None or abs(row["left"] - budget) > SAME):
            continue
        prefill = {"median": row["none_prefill"]}
        own, whole = (
            {"ms": {"first": row[name], "prefill": prefill}, "work": {"prefill": {"flops": flops}}}
            for name, flops in zip(("first", "none"), row["flops"], strict=True)
        )
        cell = {"first": row["first"], "none": row["none"], "engine": row["engine"], "timed": row["timed"]}
        faster = row["none"]["median"] / row["first"]["median"]
        yield row["plan"], row["batch"], {**cell, "faster": faster, "realised_ratio": realised(own, whole)}
