"""Runs a task under several plans on one loaded model, resumably, and writes the report."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmefficient.environment import collect
from mmefficient.errors import InputError
from mmefficient.evaluation import tasks
from mmefficient.evaluation.answers import AnswerLog
from mmefficient.evaluation.generation import Asker, batches, fingerprint
from mmefficient.evaluation.markdown import markdown
from mmefficient.evaluation.report import PlanRun, build
from mmefficient.evaluation.task import Record, Task, digest
from mmefficient.plan import Plan
from mmefficient.vlm import VLM


def run_eval(
    task: str | Task,
    plans: Sequence[str | Plan] = (),
    model: str | Path | VLM = "reference",
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kinds: Sequence[str] | None = None,
    check_flips: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Evaluates plans on a task, each against no plan, which always runs first.

    Args:
        task: a name of `mmefficient.evaluation.tasks.NAMES`, or a `Task`.
        plans: plans or their specifications, in the order of the report.
        model: "reference", a path, a hub id, or a loaded `VLM` (`device` and `dtype` are then its own).
        limit: questions in all, spread evenly over the kinds; by default every question.
        out: directory for `report.json`, `report.md` and the answers; a later run with the same settings goes on from
            the answers there. By default nothing is written.
        batch_size: questions decoded together; by default 16 on a CPU and 128 elsewhere.
        kinds: the kinds of question to ask; all by default.
        check_flips: how many questions per plan, evenly spaced, are asked again one by one, to count the answers that
            depend on the batch (low precision makes some).
        resamples: bootstrap samples behind the 95 % intervals.
        seed: of the bootstrap.
        progress: whether to draw a progress bar on stderr; by default when that is a terminal.

    Returns:
        The report, which is also the content of `report.json`: see `mmefficient.evaluation.report.build`.

    Raises:
        InputError: an unknown task or kind, a number out of range, or an `out` that is no directory or holds the
            answers of another run.
        PlanError: a plan that cannot be parsed, or does not fit the model.
        ModelError: a model that cannot be loaded, or cannot carry a plan.
    """
    _at_least(1, limit=limit, batch_size=batch_size, resamples=resamples)
    _at_least(0, check_flips=check_flips)
    task = tasks.get(task) if isinstance(task, str) else task
    chosen = list({str(plan): plan for plan in [Plan(), *map(_plan, plans)]}.values())
    records = _records(task, None if kinds is None else list(dict.fromkeys(kinds)), limit)
    folder = None if out is None else _folder(Path(out))
    vlm = model if isinstance(model, VLM) else VLM.from_pretrained(model, device=device, dtype=dtype)
    asker = Asker(vlm.model, vlm.processor, task)
    size = batch_size or (16 if vlm.model.device.type == "cpu" else 128)
    identity = {
        "task": task.name,
        "questions": len(records),
        "digest": digest(records),
        "model": fingerprint(vlm.model, vlm.processor),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "decoding": "greedy",
        "max_new_tokens": {kind: task.kinds[kind].max_new_tokens for kind in dict.fromkeys(r.kind for r in records)},
    }
    runs = []
    with ExitStack() as stack:
        logs = [stack.enter_context(_log(folder, {**identity, "plan": str(plan)}, records)) for plan in chosen]
        for plan, log in zip(chosen, logs, strict=True):
            if plan and len(log.answers) < len(records):
                with plan.apply(vlm.model) as run:
                    asker.ask(records[:1], run)  # a plan that does not fit the model is refused now, not after hours
        hidden = None if progress is None else not progress
        bar = stack.enter_context(
            tqdm(total=len(chosen) * len(records), unit="question", smoothing=0.05, disable=hidden)
        )
        for plan, log in zip(chosen, logs, strict=True):
            bar.set_description(str(plan))
            runs.append(_run(asker, plan, batches(records, size), log, check_flips, bar))
    report = build(
        task,
        records,
        runs,
        settings={**identity, "batch_size": size, "device": str(vlm.model.device), "command": shlex.join(sys.argv)},
        environment=collect(),
        resamples=resamples,
        seed=seed,
    )
    if folder is not None:
        _write(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        _write(folder / "report.md", markdown(report))
    return report


def _run(
    asker: Asker, plan: Plan, todo: Sequence[Sequence[Record]], log: AnswerLog, check: int, bar: tqdm[Any]
) -> PlanRun:
    """Answers the batches that `log` lacks; one that a kill cut in two is asked again as a whole."""
    ends = list(accumulate(map(len, todo), initial=0))
    done = bisect_right(ends, len(log.answers)) - 1
    log.cut(ends[done])
    if not bar.disable:
        for counter in ("n", "initial", "last_print_n"):  # answers from an earlier run say nothing about the time left
            setattr(bar, counter, getattr(bar, counter) + len(log.answers))
    records = [record for batch in todo for record in batch]
    check = min(check, len(records))
    checked = [records[i * len(records) // check] for i in range(check)]
    flips = []
    if done < len(todo) or checked:
        with plan.apply(asker.model) as run:
            for batch in todo[done:]:
                log.append(asker.ask(batch, run))
                bar.update(len(batch))
            answered = {answer.id: answer.text for answer in log.answers}
            flips = [record.id for record in checked if asker.ask([record], run)[0].text != answered[record.id]]
    return PlanRun(str(plan), log.answers, len(checked), flips)


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


def _log(folder: Path | None, header: dict[str, Any], records: Sequence[Record]) -> AnswerLog:
    name = f"answers-{hashlib.sha256(header['plan'].encode()).hexdigest()[:12]}.jsonl"
    return AnswerLog(None if folder is None else folder / name, header, [record.id for record in records])


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _at_least(least: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < least:
            raise InputError(f"{name} must be at least {least}, not {number}.")
