"""What plans do to the clock: vision, prefill and decode of `generate`, with and without each plan, in one run.

    python -m mmefficient.bench latency --model reference --plan "fastv(layer=2,keep=0.25)"
    python -m mmefficient.bench latency --model llava-1.5-7b --batch 1 --batch 8 --plan "random(keep=0.25)"

Plans take turns in every repeat, so that a machine that slows down slows all of them. Before anything is timed, the
empty plan must give the stock model's token ids, and every plan must keep what it says.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mmefficient.bench.floors import Ceilings, measure
from mmefficient.bench.presets import load, prompt
from mmefficient.bench.timers import StageTimer
from mmefficient.environment import collect
from mmefficient.errors import MMEfficientError
from mmefficient.loading import resolve_device, resolve_dtype
from mmefficient.plan import Plan
from mmefficient.report import Report

STAGES = ("vision", "prefill", "decode")


def run(
    model: str,
    plans: Sequence[str],
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 20,
    new_tokens: int = 16,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Time the plans; `none` is always one of them and the base of every ratio.

    Args:
        model: a name of `presets.PRESETS`, "reference", a path or a hub id.
        repeats: timed rounds after two for warm-up; medians are reported, with the 10th and 90th percentile.
        new_tokens: tokens that every row generates.

    Returns:
        {"model", "rows": [...], "ceilings", "environment", ...}; a row holds batch, plan, visual tokens of the last
        layer, ms per stage (decode per token), prefill FLOPs, the prefill's floor in ms (FLOPs or weight bytes at the
        measured ceilings) and time over floor, and the realised ratio: time saved in the prefill over what the saved
        FLOPs are worth at the plan-free prefill's own speed.
    """
    target = resolve_device(device)
    kind = resolve_dtype("bfloat16" if dtype == "auto" and target.type == "cuda" else dtype, target)
    net: Any = load(model, target, kind)
    ceilings = measure(target, kind)
    parsed = [Plan(), *(Plan(text) for text in plans if Plan(text))]
    rows = []
    for batch in batches:
        inputs = prompt(net, batch)
        _check(net, inputs, new_tokens)
        rows += _time(net, inputs, parsed, repeats, new_tokens, ceilings)
    return {
        "benchmark": "latency",
        "command": shlex.join(sys.argv),
        "model": model,
        "parameters": sum(p.numel() for p in net.parameters()),
        "dtype": str(kind).removeprefix("torch."),
        "device": str(target),
        "attention": net.config.get_text_config()._attn_implementation,
        "cache": "dynamic",
        "prompt": {"tokens": inputs["input_ids"].shape[1], "visual": _visual(net, inputs)},
        "new_tokens": new_tokens,
        "repeats": repeats,
        "ceilings": {"flops_per_s": ceilings.flops, "bytes_per_s": ceilings.bandwidth},
        "rows": rows,
        "environment": collect(),
    }


def _visual(net: Any, inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["input_ids"][:1] == net.config.image_token_id).sum())


def _generate(net: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    ids: torch.Tensor = net.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return ids


def _check(net: Any, inputs: dict[str, torch.Tensor], tokens: int) -> None:
    """Raises if the empty plan changes what the stock model generates: no time is worth reporting then."""
    stock = _generate(net, inputs, tokens)
    with Plan().apply(net):
        ours = _generate(net, inputs, tokens)
    if not torch.equal(stock, ours):
        raise MMEfficientError("the empty plan changed the generated ids; nothing was timed. Please report this.")


def _time(
    net: Any, inputs: dict[str, torch.Tensor], plans: Sequence[Plan], repeats: int, tokens: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    times: dict[Plan, list[dict[str, float]]] = {plan: [] for plan in plans}
    reports: dict[Plan, Report] = {}
    for index in range(repeats + 2):
        for plan in plans:
            with StageTimer(net) as timer, plan.apply(net) as run:
                _generate(net, inputs, tokens)
            if index >= 2:
                times[plan].append({**timer.stages_ms, "decode": timer.stages_ms["decode"] / (tokens - 1)})
            reports[plan] = run.report()
    batch = len(inputs["input_ids"])
    weights = sum(p.nbytes for p in net.get_decoder().parameters())
    base = statistics.median(t["prefill"] for t in times[plans[0]])
    rows = []
    for plan in plans:
        report = reports[plan]
        prefill = statistics.median(t["prefill"] for t in times[plan])
        floor = ceilings.floor_ms(report.prefill_flops, weights)
        saved = 1 - report.prefill_flops / report.prefill_flops_without_plan
        rows.append(
            {
                "batch": batch,
                "plan": str(plan),
                "visual_tokens_last_layer": report.rows[-1].kept_per_layer[-1],
                "ms": {stage: _spread([t[stage] for t in times[plan]]) for stage in STAGES},
                "prefill_flops": report.prefill_flops,
                "prefill_floor_ms": floor,
                "prefill_over_floor": prefill / floor,
                "realised_ratio": (1 - prefill / base) / saved if saved else None,
            }
        )
    return rows


def _spread(values: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| batch | plan | visual tokens | vision ms | prefill ms | floor ms | decode ms/token | realised ratio |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ms = {stage: row["ms"][stage]["median"] for stage in STAGES}
        ratio = "" if row["realised_ratio"] is None else f"{row['realised_ratio']:.2f}"
        lines.append(
            f"| {row['batch']} | `{row['plan']}` | {row['visual_tokens_last_layer']} | {ms['vision']:.1f} "
            f"| {ms['prefill']:.1f} | {row['prefill_floor_ms']:.2f} | {ms['decode']:.2f} | {ratio} |"
        )
    return "\n".join(lines)
