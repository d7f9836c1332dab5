"""Times of engines and plans on one prompt, side by side: the part that `latency` and `throughput` share."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mmefficient.bench.engines import Engine, Runner
from mmefficient.bench.floors import Ceilings, Work, decode_work, prefill_work, vision_work, wall_ms
from mmefficient.bench.gate import verdicts
from mmefficient.bench.picks import twin
from mmefficient.bench.presets import visual_tokens
from mmefficient.bench.result import note
from mmefficient.bench.timers import StageTimer
from mmefficient.flops import kv_bytes
from mmefficient.plan import Plan
from mmefficient.points import Reducer
from mmefficient.report import Report

Row = dict[str, Any]
WARM_UP = 3
"""Rounds that are not timed: an engine may compile in the first, and capture in the second."""


@dataclass
class Bench:
    """What to time: every stock engine without a plan, and every one of ours with every plan.

    Attributes:
        plans: without the empty one, which is always there; repeats: timed rounds; tokens: generated per row;
            tokenizer: for plans that read words.
    """

    model: Any
    engines: Sequence[Engine]
    plans: Sequence[Plan]
    ceilings: Ceilings
    repeats: int = 20
    tokens: int = 16
    tokenizer: Any = None
    runners: list[Runner] = field(default_factory=list)

    def __post_init__(self) -> None:
        every = [Plan(), *dict.fromkeys(plan for plan in self.plans if plan)]
        self.runners = [
            Runner(self.model, engine, plan, self.tokenizer)
            for plan in every
            for engine in self.engines
            if engine.ours or not plan
        ]

    def rows(self, inputs: Mapping[str, torch.Tensor]) -> list[Row]:
        """One row per engine and plan. One that fails the gate has `failed` in place of times.

        Runners take turns in every round and rounds start with another runner each, so that a machine that slows down
        slows all of them. Time to first token is that of `generate` for one token, decoding the difference to
        `tokens`, both without a stopwatch inside. A second pass splits the first token into stages.
        """
        batch = len(inputs["input_ids"])
        found = verdicts(self.runners, inputs, self.tokens)
        note(f"batch {batch}: compared {len(self.runners)} rows")
        good = [runner for runner in self.runners if not isinstance(found[runner], Exception)]
        ms = self._time(good, inputs)
        note(f"batch {batch}: timed {len(good)} rows")
        vision = vision_work(self.model, dict(inputs))
        texts = (inputs["attention_mask"].sum(1) - visual_tokens(self.model, dict(inputs))).tolist()
        rows: list[Row] = []
        for runner in self.runners:
            row: Row = {"batch": batch, "engine": runner.engine.name, "plan": str(runner.plan)}
            rows.append(row)
            if runner not in ms:
                row["failed"] = f"{type(found[runner]).__name__}: {found[runner]}"
                continue
            row["check"] = asdict(found[runner])
            row["ms"] = {stage: spread(values) for stage, values in ms[runner].items() if values}
            report, row["peak_bytes"], row["engine_facts"] = self._facts(runner, inputs)
            held = [[n + text for n in each.kept_per_layer] for each, text in zip(report.rows, texts, strict=True)]
            work = {
                "vision": vision,
                "prefill": prefill_work(self.model, held),
                "decode": decode_work(self.model, held),
            }
            work["first"] = work["vision"] + work["prefill"]
            row["visual_tokens"] = [report.rows[-1].visual_total, report.rows[-1].kept_per_layer[-1]]
            row["kv_bytes"] = kv_bytes(self.model.get_decoder().config, report.stored_tokens, self.model.dtype.itemsize)
            row["work"] = {stage: self._against(each, row["ms"].get(stage)) for stage, each in work.items()}
        _compare(rows)
        return rows

    def _against(self, work: Work, ms: Mapping[str, float] | None) -> dict[str, float | None]:
        flops, moved = self.ceilings.floors_ms(work)
        over = None if ms is None else ms["median"] / max(flops, moved)
        return {**asdict(work), "flops_floor_ms": flops, "bytes_floor_ms": moved, "over_floor": over}

    def _time(
        self, runners: Sequence[Runner], inputs: Mapping[str, torch.Tensor]
    ) -> dict[Runner, dict[str, list[float]]]:
        ms: dict[Runner, dict[str, list[float]]] = {
            runner: {"first": [], "decode": [], "vision": [], "prefill": [], "scoring": []} for runner in runners
        }
        for index in range(-WARM_UP, self.repeats):
            start = index % max(1, len(runners))
            for runner in [*runners[start:], *runners[:start]]:
                first = wall_ms(lambda run=runner: run.generate(inputs, 1), self.model.device)  # type: ignore[misc]
                whole = wall_ms(lambda run=runner: run.generate(inputs, self.tokens), self.model.device)  # type: ignore[misc]
                if index >= 0:
                    ms[runner]["first"].append(first)
                    ms[runner]["decode"].append((whole - first) / (self.tokens - 1))
        for index in range(-1, max(3, self.repeats // 2)):
            for runner in runners:
                stages = _stages(runner, inputs)
                if index >= 0:
                    for stage, value in stages.items():
                        ms[runner][stage].append(value)
        return ms

    def _facts(self, runner: Runner, inputs: Mapping[str, torch.Tensor]) -> tuple[Report, int | None, Any]:
        """The report of one call, the most bytes of device memory it needs, and what the engine says of itself.

        Other engines keep buffers between calls: counted are the weights, what this one keeps, and what the call adds.
        """
        with runner.plan.apply(self.model, tokenizer=self.tokenizer, **runner.engine.apply) as run:
            self.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        report, peak = run.report(), None
        if self.model.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.model.device)
            torch.cuda.reset_peak_memory_stats(self.model.device)
            runner.generate(inputs, self.tokens)
            peak = torch.cuda.max_memory_allocated(self.model.device) - before
            peak += sum(p.nbytes for p in self.model.parameters())
            peak += sum(report.engine.get(name, 0) for name in ("recorded_bytes", "cache_bytes"))
        return report, peak, dict(report.engine)


def _stages(runner: Runner, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Vision and prefill of one first token; and the reducers' own share of it, where the engine shows it."""
    with StageTimer(runner.model) as timer:
        runner.generate(inputs, 1)
    found = {stage: timer.stages_ms[stage] for stage in ("vision", "prefill")}
    if runner.plan and runner.engine.scores:
        spent: list[float] = []
        watched = Plan([_watched(method, spent, runner.model.device) for method in runner.plan.methods])
        Runner(runner.model, runner.engine, watched, runner.tokenizer).generate(inputs, 1)
        found["scoring"] = sum(spent)
    return found


def _watched(method: Any, spent: list[float], device: torch.device) -> Any:
    """A copy of `method` that notes how long its decisions take, the device synchronised around them."""
    if not isinstance(method, Reducer):
        return method

    def reduce(self: Reducer, *args: Any) -> Any:
        chosen: list[Any] = []
        spent.append(wall_ms(lambda: chosen.append(type(method).reduce(self, *args)), device))
        return chosen[0]

    return twin(method, reduce)


def _compare(rows: Sequence[Row]) -> None:
    """Add what needs other rows: speed against the stock engine, and what the saved FLOPs were really worth."""
    timed = [row for row in rows if "ms" in row]
    stock = next((row for row in timed if row["engine"] == "hf"), None)
    for row in timed:
        if stock is not None:
            row["speedup"] = {
                stage: stock["ms"][stage]["median"] / row["ms"][stage]["median"] for stage in ("first", "decode")
            }
        base = next((b for b in timed if b["engine"] == row["engine"] and b["plan"] == "none"), None)
        row["realised_ratio"] = None if base is None else realised(row, base)


def realised(row: Row, base: Row) -> float | None:
    """Time saved to the first token over what the saved prefill FLOPs are worth at the speed of the plan-free prefill.

    1 means that the clock shows all of what was saved. None where nothing was.
    """
    flops = [each["work"]["prefill"]["flops"] for each in (row, base)]
    if flops[0] >= flops[1]:
        return None
    first = [each["ms"]["first"]["median"] for each in (row, base)]
    return (first[1] - first[0]) / (base["ms"]["prefill"]["median"] * (1 - flops[0] / flops[1]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}
