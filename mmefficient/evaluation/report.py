"""The report of an evaluation as a JSON object: metrics with intervals, paired differences, costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.regressions import worst
from mmefficient.evaluation.statistics import Array, compare, mcnemar
from mmefficient.evaluation.task import Output, Ratio, Record, Task


@dataclass(frozen=True)
class PlanRun:
    """What one plan answered; `flips` are the ids, of `checked` questions, that it answered otherwise when alone.

    `share` is its budget (see `baselines.budget`); `rivals` are, by name of the baseline, the plans it has to beat.
    """

    plan: str
    answers: Sequence[Answer]
    checked: int = 0
    flips: Sequence[str] = ()
    share: float = 1.0
    rivals: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """Metrics that are resampled together: `table` as in `statistics.compare`."""

    names: Sequence[str]
    units: Sequence[str]
    table: Array
    pictures: Sequence[str]
    lower: bool
    """Whether less of the first metric is better."""


def build(
    task: Task,
    records: Sequence[Record],
    runs: Sequence[PlanRun],
    *,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    resamples: int,
    seed: int,
    tested: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report of `runs`: no plan, then the other `tested` plans, then baselines.

    `plans[i]["metrics"]` maps "kind/metric" and "group/metric" to {"value", "low", "high", "n"}: shares as fractions
    (other units are in `settings["units"]`), 95 % bootstrap intervals over pictures, the number of questions; undefined
    values are null. `paired` holds the differences to no plan in the same form. `visual_tokens` is the mean over
    questions and decoder layers; `prefill_flops_ratio` is the prefill's FLOPs over those without the plan;
    `questions_per_s` is by the clock, of one process.

    By the first metric of every kind and group: `against[baseline][metric]` is the difference to the mean of the
    plan's matched baselines with a "verdict", "better" or "worse" where the interval excludes zero and else "equal";
    `mcnemar[metric]` counts answers "lost" and "gained" against no plan where each is right or wrong, and has the "p"
    of the exact test; `regressions` are questions that the plan answers worse (see `regressions.worst`). `headline`
    names the metric to look at first.
    """
    tested = len(runs) if tested is None else tested
    metrics: list[dict[str, Any]] = [{} for _ in runs]
    paired: list[dict[str, Any]] = [{} for _ in runs]
    against: list[dict[str, Any]] = [{name: {} for name in run.rivals} for run in runs]
    tests: list[dict[str, Any]] = [{} for _ in runs]
    place = {run.plan: i for i, run in enumerate(runs)}
    rivals = [
        (i, name, [place[each] for each in group]) for i, run in enumerate(runs) for name, group in run.rivals.items()
    ]
    contrasts = [*((i, [0]) for i in range(len(runs))), *((i, group) for i, _, group in rivals)]
    units: dict[str, str] = {}
    blocks = list(_blocks(task, records, runs))
    for block in blocks:
        n, first = len(block.pictures), block.names[0]
        values, differences = compare(block.table, block.pictures, contrasts, resamples=resamples, seed=seed)
        units |= dict(zip(block.names, block.units, strict=True))
        for targets, estimate in ((metrics, values), (paired, differences[: len(runs)])):
            for target, rows in zip(targets, estimate, strict=True):
                target |= {name: _entry(row, n) for name, row in zip(block.names, rows, strict=True)}
        for (i, name, _), rows in zip(rivals, differences[len(runs) :], strict=True):
            entry = _entry(rows[0], n)
            against[i][name][first] = {**entry, "verdict": _verdict(entry, block.lower)}
        for i in range(1, len(runs)):
            tests[i] |= _mcnemar(block, i)
    groups = [block for block in blocks if block.table.shape[3] > 1]
    return {
        "task": task.name,
        "headline": (groups or blocks)[0].names[0],
        "judged_by": {block.names[0].rpartition("/")[0]: block.names[0] for block in blocks},
        "lower_is_better": [block.names[0] for block in blocks if block.lower],
        "plans": [
            {
                "plan": run.plan,
                "role": "none" if i == 0 else "tested" if i < tested else "baseline",
                "budget": run.share,
                "rivals": {name: list(group) for name, group in run.rivals.items()},
                "metrics": metrics[i],
                "paired": paired[i] if i else {},
                "against": against[i],
                "mcnemar": tests[i],
                "regressions": worst(task, records, runs[0].answers, run.answers) if 0 < i < tested else [],
                **_cost(run),
            }
            for i, run in enumerate(runs)
        ],
        "left_out": dict(left_out or {}),
        "environment": dict(environment),
        "settings": {
            **settings,
            "resamples": resamples,
            "seed": seed,
            "units": {name: unit for name, unit in units.items() if unit != "share"},
        },
        "digest": settings["digest"],
    }


def _verdict(entry: Mapping[str, float | int | None], lower: bool) -> str:
    low, high = entry["low"], entry["high"]
    if low is None or high is None or low <= 0 <= high:
        return "equal"
    return "better" if (high < 0 if lower else low > 0) else "worse"


def _mcnemar(block: _Block, plan: int) -> dict[str, Any]:
    """The test on a block's first metric, if it is one kind's and calls every answer right or wrong."""
    sums = block.table[:, [0, plan], 0, 0]
    if block.table.shape[3] > 1 or (sums[..., 1] != 1).any() or not np.isin(sums[..., 0], (0, 1)).all():
        return {}
    right = (sums[..., 0] == 1) != block.lower
    lost, gained, p = mcnemar(right[:, 0], right[:, 1])
    return {block.names[0]: {"lost": lost, "gained": gained, "p": float(f"{p:.6g}")}}


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
            lower=next(iter(scores[0].values())).better == "lower",
        )
    yield from kinds.values()
    for group, members in task.groups.items():
        if set(members) <= kinds.keys() and (block := _mean(group, [kinds[kind] for kind in members])).names:
            yield block


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
        lower=all(block.lower for block in blocks),
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
        "questions_per_s": round(1e3 * count / wall, 2) if (wall := sum(a.wall_ms for a in run.answers)) else None,
        "ms_per_question": {name: round(value, 4) for name, value in ms.items()},
        "flips": {"checked": run.checked, "flipped": len(run.flips), "ids": list(run.flips)},
    }
