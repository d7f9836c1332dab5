"""The baselines that every plan is measured against, at the plan's own budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mmefficient.evaluation.answers import Answer
from mmefficient.plan import Plan

RANDOM_SEEDS = (0, 1, 2)


NAMES = ("random", "grid", "pool")


def budget(answers: Collection[Answer]) -> float:
    """The share of visual tokens that a plan kept, mean over decoder layers and over all visual tokens asked about.

    It is defined for every plan, whatever its fields: a method that acts at the input has its `keep`, one that acts in
    layer k or that lets all tokens leave is charged for the layers before, one that decides picture by picture has what
    it decided. So baselines get the same number of (token, layer) pairs, which is what prefill FLOPs follow, and act at
    the input themselves.
    """
    total = sum(answer.visual_total for answer in answers)
    return round(sum(answer.visual_tokens for answer in answers) / total, 4) if total else 1.0


def matched(share: float, seeds: Sequence[int] = RANDOM_SEEDS) -> Mapping[str, tuple[Plan, ...]]:
    """By name the baselines that keep `share`; none for a plan that keeps everything or nothing."""
    if not 0 < share < 1:
        return {}
    return {
        "random": tuple(Plan(f"random(keep={share},seed={seed})") for seed in seeds),
        "grid": (Plan(f"grid(keep={share})"),),
        "pool": (Plan(f"pool(keep={share})"),),
    }
