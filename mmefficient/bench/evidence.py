"""Every method and every baseline at the same budgets: accuracy per kind of question, and what it does to the clock.

    mmefficient bench evidence --out results
    accelerate launch --multi_gpu --num_processes 8 -m mmefficient.bench evidence --out results

Accuracy is the embedded model's on the scenes test split, with paired intervals. Time to first token is measured on a
model of another size, since the embedded one is bound by launches at any length; with several processes the plans are
divided over them, and each measures the empty plan beside its own.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmefficient.bench.engines import Engine, Runner
from mmefficient.bench.evidence_page import figure, tables
from mmefficient.bench.evidence_plans import BUDGETS, Entry, entries
from mmefficient.bench.floors import wall_ms
from mmefficient.bench.measure import realised, spread
from mmefficient.bench.presets import prompt
from mmefficient.bench.result import Target
from mmefficient.bench.timers import StageTimer
from mmefficient.errors import MMEfficientError
from mmefficient.evaluation import run_eval
from mmefficient.evaluation.processes import Processes
from mmefficient.loading import resolve_device
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint
from mmefficient.vlm import VLM

WARM_UP = {"eager": 1}
"""Rounds that are not timed; 3 for other engines, which compile or capture."""

KEEP = ",positions=keep"
PER_KIND = ("value", "low", "high")


def usable(entries: Sequence[Entry], vlm: VLM, world: Processes | None = None) -> tuple[list[Entry], dict[str, str]]:
    """The entries that this installation and model can run, each plan once, under its full text; why not the others.

    Processes of a `world` divide the trials.
    """
    world = world or Processes()
    tried: list[tuple[int, Entry, str]] = []
    for place, entry in list(enumerate(entries))[world.rank :: world.size]:
        try:
            plan = Plan(entry.plan)
            with plan.apply(vlm.model):
                pass
            vlm.ask(torch.zeros(3, 8, 8, dtype=torch.uint8), "?", plan=plan, max_new_tokens=1)
        except Exception as error:  # the table names a method that fails, and does not fall with it
            tried.append((place, entry, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"))
        else:
            tried.append((place, Entry(entry.site, str(plan), entry.budget), ""))
    found: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for _, entry, why in sorted(world.gather(tried), key=lambda each: each[0]):
        if why:
            left_out[entry.plan] = why
        else:
            found.setdefault(entry.plan, entry)
    return list(found.values()), left_out


def accuracy(entries: Sequence[Entry], vlm: VLM, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table without times, no plan first, and what the evaluation says about itself.

    A row holds the plan, its site, its budget ("keep": from its last site on; "share": mean over layers, measured), its
    cost, by kind "value", "low" and "high" and the paired difference to no plan, "kept" (its mean accuracy over that of
    no plan), and the paired difference to `random` at the same share, with its verdict.
    """
    report = run_eval("scenes", [entry.plan for entry in entries], vlm, html=False, baselines=("random",), **options)
    where = {entry.plan: entry for entry in entries}
    judged, headline = report["judged_by"], report["headline"]
    base = report["plans"][0]["metrics"][headline]["value"]
    rows = []
    for plan in report["plans"]:
        if plan["role"] == "baseline" and plan["plan"] not in where:
            continue
        entry = where.get(plan["plan"], Entry("none", plan["plan"], None))
        rivals = plan["against"].get("random", {})
        rows.append(
            {
                "plan": entry.plan,
                "site": entry.site,
                "keep": entry.budget,
                "share": plan["budget"],
                "visual_tokens": plan["visual_tokens"],
                "prefill_flops": plan["prefill_flops_ratio"],
                "ms_per_question": plan["ms_per_question"],
                "kinds": {kind: _pick(plan["metrics"][name]) for kind, name in judged.items()},
                "paired": {kind: _pick(plan["paired"][name]) for kind, name in judged.items() if plan["paired"]},
                "kept": round(plan["metrics"][headline]["value"] / base, 5),
                "against_random": {
                    kind: {**_pick(rivals[name]), "verdict": rivals[name]["verdict"]}
                    for kind, name in judged.items()
                    if name in rivals
                },
            }
        )
    facts = {name: report[name] for name in ("settings", "environment", "digest", "headline", "judged_by")}
    return rows, facts


def _pick(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in PER_KIND}


def first_token(
    plans: Sequence[str], target: Target, batches: Sequence[int], repeats: int, engine: Engine
) -> list[dict[str, Any]]:
    """Time to first token of plans, in turns, with the empty plan among them: one row per plan and batch.

    Plans whose budget depends on what pictures show are left out: the weights are random.
    """
    checkpoint = Checkpoint(target.model, len(target.model.get_decoder().layers))
    runners = [Runner(target.model, engine, Plan())]
    for text in plans:
        plan = Plan(text)
        try:
            stages = [stage for method in plan.methods for stage in method.stages(checkpoint)]
        except MMEfficientError:  # no profile for random weights
            continue
        if not any(getattr(stage, "adaptive", False) for stage in stages):
            runners.append(Runner(target.model, engine, plan))
    rows = []
    for batch in batches:
        inputs = prompt(target.model, target.processor, batch)
        ms: dict[Runner, list[float]] = {}
        for index in range(-WARM_UP.get(engine.name, 3), repeats):
            for runner in list(runners):
                try:
                    took = wall_ms(partial(runner.generate, inputs, 1), target.model.device)
                except MMEfficientError:  # not on this family
                    runners.remove(runner)
                    continue
                if index >= 0:
                    ms.setdefault(runner, []).append(took)
        made: list[dict[str, Any]] = []
        for runner in runners:
            with runner.plan.apply(target.model, **engine.apply) as run:
                target.model.generate(**inputs, do_sample=False, max_new_tokens=1)
            work = {"prefill": {"flops": run.report().prefill_flops}}
            made.append({"plan": str(runner.plan), "batch": batch, "ms": {"first": spread(ms[runner])}, "work": work})
        made[0]["ms"]["prefill"] = {"median": _prefill(runners[0], inputs, repeats)}
        for row in made:
            row["realised_ratio"] = realised(row, made[0])
        rows += made
    return rows


def _prefill(runner: Runner, inputs: Mapping[str, torch.Tensor], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        with StageTimer(runner.model) as timer:
            runner.generate(inputs, 1)
        found.append(timer.stages_ms["prefill"])
    return statistics.median(found)


def joined(rows: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their times: {batch: {"first", "faster", "realised_ratio"}}; plans that were not timed have none.

    `faster` is against the empty plan that the same process timed.
    """
    clock: dict[str, dict[str, Any]] = {}
    base: dict[int, float] = {}
    for row in timed:  # each process's rows begin with its empty plan
        first = row["ms"]["first"]
        if row["plan"] == "none":
            base[row["batch"]] = first["median"]
            if str(row["batch"]) in clock.get("none", {}):
                continue
        entry = {
            "first": first,
            "faster": base[row["batch"]] / first["median"],
            "realised_ratio": row["realised_ratio"],
        }
        clock.setdefault(row["plan"], {})[str(row["batch"])] = entry
    return [{**row, "clock": clock.get(row["plan"], {})} for row in rows]


def run(
    entries: Sequence[Entry],
    vlm: VLM,
    *,
    limit: int | None,
    batch_size: int | None,
    open_target: Callable[[], Target] | None,
    batches: Sequence[int],
    repeats: int,
    engine_name: str = "eager",
    folder: Path | None = None,
    kinds: Sequence[str] | None = None,
    seeds: int = 3,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure everything, on all processes; every one of them has the whole result.

    Budgets are answered one after the other, in the order of `entries`; with `write`, the first process passes it what
    there is after each.

    Args:
        open_target: gives the `result.Target` to time on; None = no times. Plans that differ from another in
            `positions=keep` alone cost the same and are not timed.
        folder: for answers, to resume from. kinds: of question; all by default. seeds: of matched random selections.
    """
    world = Processes.current()
    chosen, left_out = usable(entries, vlm, world)
    ends = [at for at in range(1, len(chosen)) if chosen[at].budget != chosen[at - 1].budget] if write else []
    for end in [*ends, len(chosen)]:
        rows, facts = accuracy(
            chosen[:end], vlm, limit=limit, batch_size=batch_size, out=folder, kinds=kinds, seeds=range(seeds)
        )
        facts |= {"benchmark": "evidence", "seeds": seeds, "left_out": left_out}
        if write and world.rank == 0:
            write({"rows": joined(rows, []), "clock": {}, **facts})
    every = [row["plan"] for row in rows[1:]]
    plans = [plan for plan in every if KEEP not in plan or plan.replace(KEEP, "") not in every]
    made: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    # who times is alone on the device
    if open_target is not None and not (world.crowded and world.rank):
        target = open_target()
        [engine] = target.engines([engine_name])
        own = plans if world.crowded else plans[world.rank :: world.size]
        made = first_token(own, target, batches, repeats, engine)
        about = [{"model": target.name, "engine": engine.name, "batches": list(batches), "repeats": repeats}]
        about[0]["dtype"] = str(target.model.dtype).removeprefix("torch.")
    timed, found = world.gather(made), world.gather(about)
    clock = {**found[0], "processes": len(found)} if found else {}
    result = {"rows": joined(rows, timed), "clock": clock, **facts}
    if write and world.rank == 0 and found:
        write(result)
    return result


def command(
    out: Path,
    clock: str,
    limit: int | None,
    budgets: Sequence[float] | None,
    methods: Sequence[str] | None,
    batches: Sequence[int] | None,
    batch_size: int | None,
    repeats: int,
    engine: str,
    kinds: Sequence[str] | None,
    seeds: int,
    positions: str,
    device: str,
    dtype: str,
) -> None:
    """What `mmefficient bench evidence` does: measure, and let the first process write and print the tables."""
    from mmefficient.cli import quiet

    quiet()
    world = Processes.current()
    place = world.device or device
    if dtype == "auto":
        dtype = "bfloat16" if resolve_device(place).type == "cuda" else "float32"
    vlm = VLM.from_pretrained("reference", device=place, dtype=dtype, engine="eager")
    wanted = entries(len(vlm.model.get_decoder().layers), budgets or BUDGETS)
    if positions == "keep":
        also = {entry.plan for entry in wanted}
        wanted = [entry for entry in wanted if f"{entry.plan[:-1]},positions=keep)" not in also]
    if methods:
        wanted = [entry for entry in wanted if any(f"{name}(" in entry.plan for name in methods)]

    def write(result: dict[str, Any]) -> None:
        (out / "evidence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "evidence.md").write_text(f"# Evidence\n\n{tables(result)}\n", encoding="utf-8")
        try:
            figure(result).savefig(out / "evidence.png", dpi=130)
        except ImportError:
            print("no PNG: matplotlib is missing; pip install 'mmefficient[eval]' brings it.", file=sys.stderr)

    result = run(
        wanted,
        vlm,
        limit=limit,
        batch_size=batch_size,
        open_target=None if clock == "none" else partial(Target.open, clock, place, dtype),
        batches=batches or (1, 8),
        repeats=repeats,
        engine_name=engine,
        kinds=kinds,
        seeds=seeds,
        folder=out / "answers",
        write=write,
    )
    if not world.rank:
        print(tables(result))
