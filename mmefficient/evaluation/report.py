"""The report of an evaluation as a JSON object: metrics with intervals, paired differences, costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.statistics import Array, compare
from mmefficient.evaluation.task import Output, Ratio, Record, Task


@dataclass(frozen=True)
class PlanRun:
    """What one plan answered; `flips` are the ids, of `checked` questions, that it answered otherwise when alone."""

    plan: str
    answers: Sequence[Answer]
    checked: int = 0
    flips: Sequence[str] = ()


@dataclass(frozen=True)
class _Block:
    """Metrics that are resampled together: `table` as in `statistics.compare`."""

    names: Sequence[str]
    units: Sequence[str]
    table: Array
    pictures: Sequence[str]


def build(
    task: Task,
    records: Sequence[Record],
    runs: Sequence[PlanRun],
    *,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The report of `runs`, of which the first is the baseline.

    `plans[i]["metrics"]` maps "kind/metric" and "group/metric" to {"value", "low", "high", "n"}: shares as fractions
    (other units are in `settings["units"]`), 95 % bootstrap intervals over pictures, the number of questions; undefined
    values are null. `paired` holds the differences to the baseline in the same form. `visual_tokens` is the mean over
    questions and decoder layers; `prefill_flops_ratio` is the prefill's FLOPs over those without the plan.
    """
    metrics: list[dict[str, Any]] = [{} for _ in runs]
    paired: list[dict[str, Any]] = [{} for _ in runs]
    units: dict[str, str] = {}
    for block in _blocks(task, records, runs):
        estimates = compare(block.table, block.pictures, resamples=resamples, seed=seed)
        units |= dict(zip(block.names, block.units, strict=True))
        for targets, estimate in zip((metrics, paired), estimates, strict=True):
            for target, rows in zip(targets, estimate, strict=True):
                target |= {name: _entry(row, len(block.pictures)) for name, row in zip(block.names, rows, strict=True)}
    return {
        "task": task.name,
        "plans": [
            {"plan": run.plan, "metrics": values, "paired": differences if index else {}, **_cost(run)}
            for index, (run, values, differences) in enumerate(zip(runs, metrics, paired, strict=True))
        ],
        "environment": dict(environment),
        "settings": {
            **settings,
            "resamples": resamples,
            "seed": seed,
            "units": {name: unit for name, unit in units.items() if unit != "share"},
        },
        "digest": settings["digest"],
    }


def _blocks(task: Task, records: Sequence[Record], runs: Sequence[PlanRun]) -> Iterator[_Block]:
    """One block per kind, then one per group whose members were all asked."""
    kinds: dict[str, _Block] = {}
    for kind in dict.fromkeys(record.kind for record in records):
        asked = [i for i, record in enumerate(records) if record.kind == kind]
        chosen = [records[i] for i in asked]
        scores = [
            task.kinds[kind].score(chosen, [Output(run.answers[i].text, run.answers[i].truncated) for i in asked])
            for run in runs
        ]
        columns = [[_column(ratio) for ratio in score.values()] for score in scores]
        kinds[kind] = _Block(
            names=[f"{kind}/{name}" for name in scores[0]],
            units=[ratio.unit for ratio in scores[0].values()],
            table=np.moveaxis(np.array(columns), 2, 0)[:, :, :, None],
            pictures=[record.picture for record in chosen],
        )
    yield from kinds.values()
    for group, members in task.groups.items():
        if set(members) <= kinds.keys():
            yield _mean(group, [kinds[kind] for kind in members])


def _mean(group: str, blocks: Sequence[_Block]) -> _Block:
    """The unweighted means over kinds of the metrics that they share."""
    metrics = [{name.rpartition("/")[2]: i for i, name in enumerate(block.names)} for block in blocks]
    shared = [name for name in metrics[0] if all(name in other for other in metrics)]
    sizes = [len(block.pictures) for block in blocks]
    table = np.zeros((sum(sizes), blocks[0].table.shape[1], len(shared), len(blocks), 2))
    starts = np.cumsum([0, *sizes])
    for part, (block, index) in enumerate(zip(blocks, metrics, strict=True)):
        rows = slice(starts[part], starts[part + 1])
        table[rows, :, :, part] = block.table[:, :, [index[name] for name in shared], 0]
    return _Block(
        names=[f"{group}/{name}" for name in shared],
        units=[blocks[0].units[metrics[0][name]] for name in shared],
        table=table,
        pictures=[picture for block in blocks for picture in block.pictures],
    )


def _column(ratio: Ratio) -> Array:
    return np.stack([ratio.numerator, ratio.denominator], axis=-1)


def _entry(estimate: Array, n: int) -> dict[str, float | int | None]:
    """JSON form of one estimate; 8 decimals hide the order in which a machine adds floats."""
    numbers = zip(("value", "low", "high"), estimate.tolist(), strict=True)
    return {**{name: round(x, 8) if math.isfinite(x) else None for name, x in numbers}, "n": n}


def _cost(run: PlanRun) -> dict[str, Any]:
    """Visual tokens, FLOPs and times of a run, summed in the order of the answers."""
    count = len(run.answers)
    without = sum(answer.prefill_flops_without_plan for answer in run.answers)
    stages = dict.fromkeys(name for answer in run.answers for name in answer.ms)
    ms = {name: sum(answer.ms.get(name, 0.0) for answer in run.answers) / count for name in stages}
    return {
        "questions": count,
        "visual_tokens": round(sum(answer.visual_tokens for answer in run.answers) / count, 4),
        "visual_tokens_without_plan": round(sum(answer.visual_total for answer in run.answers) / count, 4),
        "prefill_flops_ratio": round(sum(a.prefill_flops for a in run.answers) / without, 6) if without else None,
        "seconds": round(sum(ms.values()) * count / 1e3, 3),
        "ms_per_question": {name: round(value, 4) for name, value in ms.items()},
        "flips": {"checked": run.checked, "flipped": len(run.flips), "ids": list(run.flips)},
    }
