"""Runs a task under several plans on one loaded model, resumably, and writes the report."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmefficient.environment import collect, command
from mmefficient.errors import InputError
from mmefficient.evaluation import tasks
from mmefficient.evaluation.baselines import NAMES, RANDOM_SEEDS
from mmefficient.evaluation.execution import Execution
from mmefficient.evaluation.generation import Asker, fingerprint
from mmefficient.evaluation.markdown import markdown
from mmefficient.evaluation.page import page
from mmefficient.evaluation.processes import Processes
from mmefficient.evaluation.regressions import draw
from mmefficient.evaluation.report import build
from mmefficient.evaluation.task import Record, Task, digest, hashes
from mmefficient.plan import Plan
from mmefficient.vlm import VLM


def run_eval(
    task: str | Task,
    plans: Sequence[str | Plan] = (),
    model: str | Path | VLM = "reference",
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    variant: str | None = None,
    skip_bad: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kinds: Sequence[str] | None = None,
    baselines: bool | Collection[str] = True,
    seeds: Sequence[int] = RANDOM_SEEDS,
    check_flips: int = 0,
    html: bool = True,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
    trial: bool = True,
) -> dict[str, Any]:
    """Evaluates plans on a task, each against no plan, which always runs first, and against blind baselines.

    Under `accelerate launch` the processes divide the batches, which are the same as for one process, and every one of
    them returns the whole report; the first writes it.

    Args:
        task: a name of `mmefficient.evaluation.tasks.NAMES`, or a `Task`.
        plans: plans or their specifications, in the order of the report.
        model: "reference", a path, a hub id, or a loaded `VLM` (`device` and `dtype` are then its own).
        limit: questions in all, spread evenly over the kinds; by default every question.
        out: directory for `report.json`, `report.md`, `report.html` and the answers; a later run with the same
            settings goes on from the answers there. By default nothing is written.
        data: where the task's annotations and pictures are: a folder of official files (see docs/evaluation.md), or a
            hub id. "scenes" and "easy-vqa" bring their own.
        variant: the prompt and generation settings to use; the task's first by default.
        skip_bad: leave out records that cannot be used, and list them in the report; by default they are an error.
        batch_size: questions decoded together; by default 16 on a CPU and 128 elsewhere.
        kinds: the kinds of question to ask; all by default.
        baselines: whether to add `random` (three seeds), `grid` and `pool`, or which of them, at the budget of every
            plan, which is its mean share of visual tokens over decoder layers (see
            `mmefficient.evaluation.baselines.budget`).
        seeds: of the `random` baselines, whose mean is compared with.
        check_flips: how many questions per plan, evenly spaced, are asked again one by one, to count the answers that
            depend on the batch (low precision makes some).
        html: whether `report.html`, with its plots and lost answers, is one of the files.
        resamples: bootstrap samples behind the 95 % intervals.
        seed: of the bootstrap.
        progress: whether to draw a progress bar on stderr; by default when that is a terminal.
        trial: whether every plan is tried on one question before the others are asked, by each process.

    Returns:
        The report, which is also the content of `report.json`: see `mmefficient.evaluation.report.build`.

    Raises:
        InputError: an unknown task, variant or kind, data that cannot be used, a number out of range, or an `out`
            that is no directory or holds the answers of another run.
        PlanError: a plan that cannot be parsed, or does not fit the model.
        ModelError: a model that cannot be loaded, or cannot carry a plan.
    """
    _at_least(1, limit=limit, batch_size=batch_size, resamples=resamples)
    _at_least(0, check_flips=check_flips)
    task = tasks.get(task, data, variant, skip_bad=skip_bad)
    chosen = list({str(plan): plan for plan in [Plan(), *map(_plan, plans)]}.values())
    records = _records(task, None if kinds is None else list(dict.fromkeys(kinds)), limit)
    folder = None if out is None else _folder(Path(out))
    world = Processes.current()
    if world.device and device == "auto":
        device = world.device
    vlm = model if isinstance(model, VLM) else VLM.from_pretrained(model, device=device, dtype=dtype)
    asker = Asker(vlm.model, vlm.processor, task)
    size = batch_size or (16 if vlm.model.device.type == "cpu" else 128)
    identity = {
        "task": task.name,
        "questions": len(records),
        "digest": digest(records),
        "model": fingerprint(vlm.model, vlm.processor),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        **task.facts(),
        "hashes": hashes(task, records),
        "decoding": "greedy",
        "max_new_tokens": {kind: task.kinds[kind].max_new_tokens for kind in dict.fromkeys(r.kind for r in records)},
    }
    with Execution(asker, records, identity, folder, world) as execution:
        given = [execution.add(plan, trial) for plan in chosen]
        wanted = NAMES if baselines is True else baselines or ()
        if wanted:
            execution.run(size, 0, progress)  # budgets are what plans turn out to keep
        for job in given[1:] if wanted else ():
            execution.add_baselines(job, wanted, seeds, trial)
        runs = execution.run(size, check_flips, progress)
    report = build(
        task,
        records,
        runs,
        tested=len(given),
        settings={
            **identity,
            "batch_size": size,
            "processes": world.size,
            "device": str(vlm.model.device),
            "command": command(),
        },
        environment=collect(),
        resamples=resamples,
        seed=seed,
        left_out=execution.left_out,
    )
    if folder is not None and world.rank == 0:
        _write(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        _write(folder / "report.md", markdown(report))
        if html:
            _write_page(folder, asker, records, report)
    return report


def _plan(plan: str | Plan) -> Plan:
    return Plan(plan) if isinstance(plan, str) else plan


def _records(task: Task, kinds: Sequence[str] | None, limit: int | None) -> list[Record]:
    """The task's records, kind by kind; a limit takes the first ones of every kind in turn."""
    unknown = [kind for kind in kinds or () if kind not in task.kinds]
    if unknown:
        raise InputError(f'The task {task.name} has no kind "{unknown[0]}"; choose from: {", ".join(task.kinds)}.')
    order = list(task.kinds)
    records = sorted(task.records(kinds, limit), key=lambda record: order.index(record.kind))
    if limit is not None:
        place = {r.id: i for kind in order for i, r in enumerate(r for r in records if r.kind == kind)}
        first = sorted(records, key=lambda record: place[record.id])[:limit]
        records = sorted(first, key=lambda record: order.index(record.kind))
    if not records:
        raise InputError(f"The task {task.name} has no questions of these kinds; choose others.")
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise InputError(f'The task {task.name} has two questions with the id "{record.id}"; ids must differ.')
        seen.add(record.id)
    return records


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be the output directory ({error.strerror}); choose another.") from error
    return path


def _write_page(folder: Path, asker: Asker, records: Sequence[Record], report: dict[str, Any]) -> None:
    """Writes `report.html`; without matplotlib, which draws its plots, only says so."""
    if find_spec("matplotlib") is None:
        warnings.warn(
            "report.html was not written: its plots need matplotlib; pip install 'mmefficient[eval]' and run again, "
            "which asks nothing twice. report.json and report.md are complete.",
            stacklevel=3,
        )
        return
    _write(folder / "report.html", page(report, draw(asker, records, report, folder / "regressions")))


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _at_least(least: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < least:
            raise InputError(f"{name} must be at least {least}, not {number}.")
