"""What rankings keep, held against a reference: in low precision, tokens of nearly the same rank change places."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmefficient.errors import MMEfficientError
from mmefficient.plan import Plan
from mmefficient.points import Reducer, Selection, VisualTokens, select_top
from mmefficient.report import Report


@dataclass
class Picks:
    """How a reference ranks the tokens that another engine kept, and that it is made to keep as well.

    Attributes:
        kept: tokens compared; swaps: how many of them score less than any that the reference would have kept.
        gap: the most that they score below it, in standard deviations of the scores of their unit.
    """

    kept: int = 0
    swaps: int = 0
    gap: float = 0.0

    def told(self, plan: Plan, report: Report) -> Plan:
        """`plan`, keeping what `report` says was kept; how its own scores rank that is noted here.

        Methods that only rank are told. Others decide for themselves: those that merge, that choose how many stay, that
        share a site, or whose units do not follow each other in the prompt.
        """
        sites = Counter(method.site for method in plan.methods if isinstance(method, Reducer))
        told = [self._told(m, report) if _ranks(m) and sites[m.site] == 1 else m for m in plan.methods]  # type: ignore[attr-defined]
        return Plan(told)

    def _told(self, method: Any, report: Report) -> Any:
        def reduce(self_: Reducer, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
            chosen = _kept(report, self_.site, tokens)
            if chosen.sum(1).tolist() != list(counts):
                raise MMEfficientError(f"{method.name} kept other numbers of tokens than its budget says.")
            scores = self_.score(tokens).float()
            for one, used, mine, count in zip(scores, tokens.valid, chosen, counts, strict=True):
                self._note(one[used], mine[used], count)
            return select_top(chosen.float(), tokens.valid, counts)

        return twin(method, reduce)

    def _note(self, scores: torch.Tensor, mine: torch.Tensor, count: int) -> None:
        if not count:
            return
        behind = scores.topk(count).values[-1] - scores[mine]
        self.kept += count
        self.swaps += int((behind > 0).sum())
        if behind.max() > 0:
            self.gap = max(self.gap, float(behind.max() / scores.std()))


def twin(method: Any, reduce: Callable[..., Selection]) -> Any:
    """A copy of `method` with another `reduce`."""
    copied = copy.copy(method)
    object.__setattr__(copied, "__class__", type(type(method).__name__, (type(method),), {"reduce": reduce}))
    return copied


def _ranks(method: Any) -> bool:
    if not isinstance(method, Reducer) or method.adaptive or method.staged or method.scope == "tile":
        return False
    return type(method).reduce is Reducer.reduce


def _kept(report: Report, site: int, tokens: VisualTokens) -> torch.Tensor:
    """bool [U, N]: which of `tokens`, what the layer `site` was given, it held after its reducer."""
    found = torch.zeros(tokens.valid.shape, dtype=torch.bool)
    passed: Counter[int] = Counter()
    for place, unit in enumerate(tokens.units):
        until = report.lives_until[unit.row]
        given = until[until >= site][passed[unit.row] :][: unit.count]
        found[place, : unit.count] = given > site
        passed[unit.row] += unit.count
    return found.to(tokens.valid.device)
