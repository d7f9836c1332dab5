"""What choosing tokens costs: greedy selection beside plain torch loops, and whole decisions of methods.

    mmefficient bench selection
    mmefficient bench selection --plan "divprune(keep=0.111)" --plan "scope(keep=0.111)" --out selection.json

Inputs are random, of LLaVA's sizes and in bfloat16 where such a model gives them so: one picture of 576 patches, five
crops of 576, and one unit of 2,880. Times are medians of wall time from an idle device to an idle device, launches
included, in milliseconds. Picks of the kernel are
compared with those of the loops before anything is timed; with sums of different order two scores that agree to the
last bits may swap, so the table says how many picks are shared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mmefficient.environment import collect, command
from mmefficient.errors import PlanError
from mmefficient.kernels.greedy_select import Objective, greedy_select
from mmefficient.loading import resolve_device
from mmefficient.plan import Plan
from mmefficient.points import LayerTokens, MatchTokens, Reducer, TowerTokens, Unit, VisualTokens

ASKED = 12  # tokens of the question, for methods that look at it
CASES = ((1, 576), (5, 576), (1, 2880))
"""Units and patches per unit; a ninth of them stays."""

PLANS = (
    "divprune(keep=0.1111)",
    "scope(keep=0.1111)",
    "cdpruner(keep=0.1111,matcher=words)",
    "vispruner(keep=0.1111)",
    "visionzip(dominant=54,contextual=10)",
    "prumerge(keep=0.1111)",
    "prumerge",
    "hiprune(keep=0.1111)",
    "trim(keep=0.1111,matcher=words)",
    "fastervlm(keep=0.1111)",
)
KNOWN = {"tower", "full_grid", "match"}
OBJECTIVES: tuple[Objective, ...] = ("max_min", "coverage", "volume")


def run(
    plans: Sequence[str] = PLANS, *, device: str = "auto", repeats: int = 20, width: int = 4096, tower_width: int = 1024
) -> dict[str, Any]:
    """Time selection; on a device without Triton the kernel's column is the plain loop's too.

    Args:
        plans: methods at the language model's input, one per plan.
        width: of the language model; tower_width: of the vision tower.

    Returns:
        {"benchmark", "rows": [...], "environment", ...}; a row holds what was chosen by, units, items, kept, ms, and
        for the objectives loop_ms and shared_picks.

    Raises:
        PlanError: a plan is not one method that decides from what the input offers.
    """
    target = resolve_device(device)
    reducers = [_single(plan) for plan in plans]
    rows: list[dict[str, Any]] = []
    for units, items in CASES:
        tokens = random_tokens(units, items, width, tower_width, target)
        steps = round(items / 9)
        rows += [_objective(tokens, steps, objective, repeats) for objective in OBJECTIVES]
        for reducer in reducers:
            rows.append(_method(reducer, tokens, repeats))
    return {
        "benchmark": "selection",
        "command": command(),
        "device": str(target),
        "repeats": repeats,
        "widths": [width, tower_width],
        "rows": rows,
        "environment": collect(),
    }


def random_tokens(units: int, items: int, width: int, tower_width: int, device: torch.device) -> VisualTokens:
    """Units of one square grid (or a 5-high stack of them) each; features share a direction, as those of towers do."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    side = int((items // 5 if items % 5 == 0 else items) ** 0.5)
    grids = ((items // side, side),)
    tower = TowerTokens(
        (draw(units, items, tower_width) + draw(tower_width)).bfloat16(),
        draw(units, items).abs() / items,
        draw(units, items, 64).bfloat16(),
    )
    hidden = (draw(units, items, width) + draw(width)).bfloat16()
    everything = torch.ones(units, items, dtype=torch.bool, device=device)
    return VisualTokens(
        tuple(Unit(0, f"image {unit}", unit, items, grids) for unit in range(units)),
        hidden,
        everything,
        torch.ones(units, items, device=device),
        tower=tower,
        match=MatchTokens.embedded("words", hidden, draw(units, ASKED, width), everything[:, :ASKED]),
    )


def median_ms(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall time of `work` in milliseconds, after three runs for warm-up."""
    times = []
    for _ in range(3 + repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times[3:]), 4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _single(plan: str) -> Reducer:
    methods = Plan(plan).methods
    one = methods[0] if len(methods) == 1 else None
    if not isinstance(one, Reducer) or one.site or one.staged or not one.needs <= KNOWN:
        raise PlanError(f"{plan!r} is not one method that decides at the language model's input, from what is there.")
    return one


def _method(reducer: Reducer, tokens: VisualTokens, repeats: int) -> dict[str, Any]:
    """One whole decision: products, loops and sorts, from what the vision tower and the matcher have left."""
    assert tokens.tower is not None
    own = tokens.tower
    layers = {
        layer: LayerTokens(own.attention.roll(number + 1, 1), own.features if layer.joined else own.keys)
        for number, layer in enumerate(reducer.tower_layers)
    }
    tokens = replace(tokens, tower=replace(own, layers=layers))
    if reducer.adaptive:
        decide: Callable[[], Any] = partial(reducer.choose, tokens)
        kept = reducer.choose(tokens)[1][0]
    else:
        counts = [reducer.budget(unit) for unit in tokens.units]
        decide, kept = partial(reducer.reduce, tokens, counts), counts[0]
    units, items = tokens.valid.shape
    ms = median_ms(decide, tokens.valid.device, repeats)
    return {"by": str(reducer), "units": units, "items": items, "kept": kept, "ms": ms}


def _objective(tokens: VisualTokens, steps: int, objective: Objective, repeats: int) -> dict[str, Any]:
    """Kernel and loop on one set of pairs; the product that makes the pairs is not timed here."""
    assert tokens.tower is not None
    features = torch.nn.functional.normalize(tokens.tower.features.float(), dim=-1)
    weight, device = tokens.tower.attention, features.device
    pairs = features @ features.mT
    if objective == "max_min":
        pairs = 1 - pairs
    elif objective == "volume":
        pairs = pairs * weight[:, None] * weight[:, :, None]

    def choose(impl: Any) -> torch.Tensor:
        return greedy_select(pairs, tokens.valid, steps, objective=objective, weight=weight, impl=impl)

    found, wanted = choose("auto"), choose("reference")
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True))
    return {
        "by": objective,
        "units": len(pairs),
        "items": pairs.shape[1],
        "kept": steps,
        "ms": median_ms(lambda: choose("auto"), device, repeats),
        "loop_ms": median_ms(lambda: choose("reference"), device, min(repeats, 5)),
        "shared_picks": round(shared / found.numel(), 4),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'by':48} {'units x items':>14} {'kept':>5} {'ms':>9} {'loop ms':>9} {'shared':>7}"]
    for row in result["rows"]:
        size = f"{row['units']} x {row['items']}"
        loop = f"{row['loop_ms']:9.3f} {row['shared_picks']:7.1%}" if "loop_ms" in row else ""
        lines.append(f"{row['by']:48} {size:>14} {row['kept']:5} {row['ms']:9.3f} {loop}".rstrip())
    return "\n".join(lines)
