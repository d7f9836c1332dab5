"""Every method and every baseline at the same budgets: accuracy per kind of question, and what it does to the clock.

    mmefficient bench evidence --out results
    accelerate launch --multi_gpu --num_processes 8 -m mmefficient.bench evidence --out results

Accuracy is the embedded model's on the scenes test split, with paired intervals. Time to first token is measured on a
model of another size, since the embedded one is bound by launches at any length; with several processes the plans are
divided over them, and each measures the empty plan beside its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmefficient.bench.evidence_clock import ClockLog, entries_of, files, measure, read
from mmefficient.bench.evidence_page import figure, tables
from mmefficient.bench.evidence_plans import BUDGETS, Entry, entries
from mmefficient.bench.result import Target
from mmefficient.errors import InputError
from mmefficient.evaluation import run_eval
from mmefficient.evaluation.processes import Processes
from mmefficient.loading import resolve_device
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

KEEP = ",positions=keep"
PER_KIND = ("value", "low", "high")
CAPTIONS = ("caption/recall", "caption/chair_s", "caption/chair_i")


def usable(
    entries: Sequence[Entry], vlm: VLM, world: Processes | None = None, known: Collection[str] = ()
) -> tuple[list[Entry], dict[str, str]]:
    """The entries that this installation and model can run, each plan once, under its full text; why not the others.

    Processes of a `world` divide the trials; plans in `known`, which have answers already, need none.
    """
    world = world or Processes()
    tried: list[tuple[int, Entry, str]] = []
    for place, entry in list(enumerate(entries))[world.rank :: world.size]:
        try:
            plan = Plan(entry.plan)
            if str(plan) not in known:
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


def plan_of(path: Path) -> str:
    """The plan whose answers are in a file."""
    with path.open(encoding="utf-8") as file:
        plan: str = json.loads(file.readline())["plan"]
    return plan


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
                "captions": {name: _pick(plan["metrics"][name]) for name in CAPTIONS if name in plan["metrics"]},
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
    return {name: None if entry[name] is None else round(entry[name], 6) for name in PER_KIND}


def joined(rows: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their times by batch (`evidence_clock.entries_of`); plans that were not timed have none.

    Plans that differ from another in `positions=keep` alone cost the same and are given its times.
    """
    clock: dict[str, dict[str, Any]] = {}
    for plan, batch, cell in entries_of(timed, {row["plan"]: row.get("keep") for row in rows}):
        clock.setdefault(plan, {})[str(batch)] = cell
    return [{**row, "clock": clock.get(row["plan"]) or clock.get(row["plan"].replace(KEEP, ""), {})} for row in rows]


def with_times(result: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A result with the times that there are in `folder`."""
    logs = [read(path) for path in files(folder)]
    clock = {**logs[0][0], "processes": len(logs)} if logs else {}
    return {**result, "rows": joined(result["rows"], [row for _, found in logs for row in found]), "clock": clock}


def run(
    entries: Sequence[Entry],
    vlm: VLM,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    folder: Path | None = None,
    kinds: Sequence[str] | None = None,
    seeds: int = 3,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Answer the questions on all processes, and put the times in `folder` beside; every process has the whole result.

    Budgets are answered one after the other, in the order of `entries`; with `write`, the first process passes it what
    there is after each.

    Args:
        folder: for answers, to resume from, in a folder of their own. kinds: of question; all by default.
        seeds: of matched random selections.
    """
    world = Processes.current()
    known = {plan_of(path) for path in (folder / "answers").glob("*.jsonl")} if folder else set()
    chosen, left_out = usable(entries, vlm, world, known)
    ends = [at for at in range(1, len(chosen)) if chosen[at].budget != chosen[at - 1].budget] if write else []
    # tables that an earlier run has passed are not made again
    ends = [end for end in ends if not {entry.plan for entry in chosen[:end]} <= known]
    options = {"limit": limit, "batch_size": batch_size, "kinds": kinds, "seeds": range(seeds), "trial": False}
    result: dict[str, Any] = {}
    for end in [*ends, len(chosen)]:
        rows, facts = accuracy(chosen[:end], vlm, out=folder and folder / "answers", **options)
        facts |= {"benchmark": "evidence", "left_out": left_out, "seeds": seeds}
        result = with_times({**facts, "rows": rows}, folder)
        if write and world.rank == 0:
            write(result)
    return result


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def first_tokens(
    entries: Sequence[Entry],
    deeper: Callable[[int], Sequence[Entry]],
    open_target: Callable[[], Target],
    batches: Sequence[int],
    repeats: int,
    engine_name: str,
    folder: Path | None,
) -> list[dict[str, Any]]:
    """Rows of `evidence_clock`, on this process; several processes divide the plans, unless they share a device.

    Args:
        entries: of the table; deeper: the same for a model of so many layers. Plans that differ from another in
            `positions=keep` alone cost the same and are not timed.
    """
    world = Processes.current()
    if world.crowded and world.rank:  # who times is alone on the device
        return []
    target = open_target()
    [engine] = target.engines([engine_name])
    twins = deeper(len(target.model.get_decoder().layers))
    pairs = {str(Plan(entry.plan)): str(Plan(twin.plan)) for entry, twin in zip(entries, twins, strict=True)}
    own = [(plan, twin) for plan, twin in pairs.items() if KEEP not in plan or plan.replace(KEEP, "") not in pairs]
    about = {"model": target.name, "engine": engine.name, "repeats": repeats, "batches": list(batches)}
    about |= {"dtype": str(target.model.dtype).removeprefix("torch."), "device": _name(target.model.device)}
    log = ClockLog(folder, about, world.rank)
    measure(own if world.crowded else own[world.rank :: world.size], target, batches, repeats, engine, log)
    return log.rows


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
    part: str,
    device: str,
    dtype: str,
) -> None:
    """What `mmefficient bench evidence` does: measure, and let the first process write and print the tables."""
    from mmefficient.cli import quiet

    def write(result: dict[str, Any]) -> None:
        (out / "evidence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "evidence.md").write_text(f"# Evidence\n\n{tables(result)}\n", encoding="utf-8")
        try:
            figure(result).savefig(out / "evidence.png", dpi=130)
        except ImportError:
            print("no PNG: matplotlib is missing; pip install 'mmefficient[eval]' brings it.", file=sys.stderr)

    quiet()
    if part == "table":
        made = out / "evidence.json"
        if not made.exists():
            raise InputError(f"{made} does not exist; make it with --part accuracy.")
        write(with_times(json.loads(made.read_text(encoding="utf-8")), out))
        return
    if part not in ("both", "accuracy", "clock"):
        raise InputError(f"--part {part} is none of both, accuracy, clock and table.")
    world = Processes.current()
    place = world.device or device
    if dtype == "auto":
        dtype = "bfloat16" if resolve_device(place).type == "cuda" else "float32"
    vlm = VLM.from_pretrained("reference", device=place, dtype=dtype, engine="eager")

    def chosen(found: list[Entry]) -> list[Entry]:
        also = {entry.plan for entry in found} if positions == "keep" else ()
        found = [entry for entry in found if f"{entry.plan[:-1]},positions=keep)" not in also]
        return [entry for entry in found if not methods or any(f"{name}(" in entry.plan for name in methods)]

    wanted = chosen(entries(len(vlm.model.get_decoder().layers), budgets or BUDGETS))

    if part != "accuracy" and clock != "none":
        first_tokens(
            wanted,
            lambda layers: chosen(entries(layers, budgets or BUDGETS)),
            partial(Target.open, clock, place, dtype),
            batches or (1, 8),
            repeats,
            engine,
            out,
        )
        world.gather([world.rank])
    if part == "clock":
        return
    result = run(wanted, vlm, limit=limit, batch_size=batch_size, folder=out, kinds=kinds, seeds=seeds, write=write)
    if not world.rank:
        print(tables(result))
