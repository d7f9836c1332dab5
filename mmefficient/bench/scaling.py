"""How the prefill grows with visual tokens and batch: measured points, a fitted cost model, and what binds.

    mmefficient bench scaling --model llava-1.5-7b --tokens 64 --tokens 1024 --tokens 32768 --batch 1 --batch 8

A prompt holds as many small pictures as make up the wanted tokens. Time is that of the stage `prefill`: the language
model without the vision tower. The model is t = a + b·B·n + c·B·n² for B rows of n positions, with no coefficient
negative and errors relative to the measured times: a is what every prefill costs (launches, and reading the weights),
b the matrices, c attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mmefficient.bench.engines import Runner
from mmefficient.bench.floors import prefill_work
from mmefficient.bench.gate import verdicts
from mmefficient.bench.measure import Row, spread
from mmefficient.bench.presets import SMALL, prompt, visual_tokens
from mmefficient.bench.result import Target, header, note
from mmefficient.bench.tables import cell, markdown
from mmefficient.bench.timers import StageTimer
from mmefficient.plan import Plan

TOKENS = (64, 128, 256, 576, 1024, 2048, 4096, 8192, 16384, 32768)
MOST = 65536
"""Positions of all rows together, above which a point is left out."""
OVERHEAD = 2.0
"""From so many times the floor on, neither arithmetic nor bytes are what binds."""


def run(
    target: Target,
    plans: Sequence[str] = (),
    tokens: Sequence[int] = TOKENS,
    batches: Sequence[int] = (1, 8),
    *,
    engines: Sequence[str] | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure every engine and plan at every point; the stock engines without a plan only.

    Args:
        tokens: visual tokens per row, rounded to whole pictures; a point that gives the same number twice is left out.
    """
    every = [Plan(), *(plan for plan in target.plans(plans) if plan)]
    runners = [Runner(target.model, e, p) for p in every for e in target.engines(engines) if e.ours or not p]
    side = (2 * SMALL,) * 2 if target.name.startswith("qwen") else (SMALL,) * 2
    each = visual_tokens(target.model, prompt(target.model, target.processor, size=side))
    rows: list[Row] = []
    for batch in batches:
        for pictures in dict.fromkeys(max(1, round(wanted / each)) for wanted in tokens):
            inputs = prompt(target.model, target.processor, batch, pictures=pictures, size=side)
            if inputs["input_ids"].numel() <= MOST:
                rows += _point(target, runners, inputs, repeats)
                note(f"batch {batch}: timed {inputs['input_ids'].shape[1]} positions")
    fits = [
        {"engine": runner.engine.name, "plan": str(runner.plan), **fit(points)}
        for runner in runners
        if len(points := _of(rows, runner.engine.name, str(runner.plan))) >= 3
    ]
    return {**header("scaling", target), "tokens_per_picture": each, "repeats": repeats, "rows": rows, "fits": fits}


def _of(rows: Sequence[Row], engine: str, plan: str) -> list[Row]:
    return [row for row in rows if (row["engine"], row["plan"]) == (engine, plan) and "ms" in row]


def _point(target: Target, runners: list[Runner], inputs: dict[str, Any], repeats: int) -> list[Row]:
    found = verdicts(runners, inputs, 1)
    times: dict[Runner, list[float]] = {runner: [] for runner in runners}
    for index in range(-2, repeats):
        for runner in (each for each in runners if not isinstance(found[each], Exception)):
            with StageTimer(target.model) as timer:
                runner.generate(inputs, 1)
            if index >= 0:
                times[runner].append(timer.stages_ms["prefill"])
    batch, length = inputs["input_ids"].shape
    visual = visual_tokens(target.model, inputs)
    rows: list[Row] = []
    for runner in runners:
        row: Row = {"batch": batch, "positions": length, "visual_tokens": visual}
        rows.append(row | {"engine": runner.engine.name, "plan": str(runner.plan)})
        if not times[runner]:
            rows[-1]["failed"] = f"{type(found[runner]).__name__}: {found[runner]}"
            continue
        with runner.plan.apply(target.model) as run:
            target.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        held = [[n + length - visual for n in one.kept_per_layer] for one in run.report().rows]
        work = prefill_work(target.model, held)
        flops, moved = target.ceilings.floors_ms(work)
        ms = spread(times[runner])
        over = ms["median"] / max(flops, moved)
        binds = "overhead" if over >= OVERHEAD else "arithmetic" if flops >= moved else "bytes"
        rows[-1] |= {"ms": ms, "flops": work.flops, "bytes": work.bytes, "flops_floor_ms": flops,
                     "bytes_floor_ms": moved, "over_floor": over, "binds": binds}  # fmt: skip
    return rows


def fit(points: Sequence[Row]) -> dict[str, Any]:
    """The cost model of `points`, in ms: a, b, c, the mean relative error, and where the curve bends.

    `linear_from` is where B·n positions cost as much as the constant part, `quadratic_from` the n where attention
    costs as much as the matrices; None where that never happens.
    """
    batch, n, ms = (
        np.array([float(value(row)) for row in points])
        for value in (lambda row: row["batch"], lambda row: row["positions"], lambda row: row["ms"]["median"])
    )
    terms = np.stack([np.ones_like(n), batch * n, batch * n**2], 1) / ms[:, None]  # relative errors
    scale = terms.max(0)
    best, least = np.zeros(3), float("inf")
    for size in (1, 2, 3):  # the least squares of every subset of terms; the best one that is nowhere negative
        for subset in map(list, combinations(range(3), size)):
            found = np.linalg.lstsq(terms[:, subset] / scale[subset], np.ones(len(points)), rcond=None)[0]
            trial = np.zeros(3)
            trial[subset] = found / scale[subset]
            error = float(np.abs(terms @ trial - 1).mean())
            if (found >= 0).all() and float(((terms @ trial - 1) ** 2).sum()) < least:
                best, least, mean = trial, float(((terms @ trial - 1) ** 2).sum()), error
    a, b, c = best.tolist()
    return {
        "a_ms": a,
        "b_ms": b,
        "c_ms": c,
        "relative_error": mean,
        "linear_from": a / b if b else None,
        "quadratic_from": b / c if c else None,
    }


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    titles = ["batch", "engine", "plan", "visual tokens", "positions", "prefill ms", "FLOP floor ms", "byte floor ms",
              "time / floor", "what binds"]  # fmt: skip
    lines = []
    for row in result["rows"]:
        start = [row["batch"], row["engine"], f"`{row['plan']}`", row["visual_tokens"], row["positions"]]
        if "failed" in row:
            lines.append([*start, f"failed: {row['failed'].splitlines()[0]}", *[""] * 4])
            continue
        floors = (cell(row[name], 2) for name in ("flops_floor_ms", "bytes_floor_ms", "over_floor"))
        lines.append([*start, cell(row["ms"]["median"], 2), *floors, row["binds"]])
    fits = [
        [one["engine"], f"`{one['plan']}`", *(f"{one[name]:.3g}" for name in ("a_ms", "b_ms", "c_ms")),
         cell(100 * one["relative_error"], 0, " %"),
         *(cell(one[name], 0) for name in ("linear_from", "quadratic_from"))]
        for one in result["fits"]
    ]  # fmt: skip
    heads = ["engine", "plan", "a ms", "b ms", "c ms", "mean error", "linear from B·n", "quadratic from n"]
    return f"{markdown(titles, lines, left=3)}\n\nt = a + b·B·n + c·B·n²:\n\n{markdown(heads, fits, left=2)}"
