"""The correctness gate: no time of an engine whose tokens are not those of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from mmefficient.bench.engines import ATTACHED, STOCK, Runner
from mmefficient.bench.picks import Picks
from mmefficient.errors import MMEfficientError

LIMITS = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.1, torch.bfloat16: 0.25}
"""How far below the reference's best logit a chosen token may lie, in standard deviations of the logits. About three of
32,000 normal logits lie within 0.25 of the best; a wrong computation picks one that is about four below. Likewise how
far a visual token that stays may score below those that the reference would have kept, in deviations of the scores."""


@dataclass(frozen=True)
class Verdict:
    """How the tokens of an engine compare with a reference that is made to generate the same ones.

    Attributes:
        tokens: compared; flips: how many are not the reference's own choice at their place.
        gap: the most that a chosen token's logit lies below the best, in standard deviations of the logits.
        kept, swaps, kept_gap: the same for the visual tokens that rankings kept, see `Picks`.
    """

    tokens: int
    flips: int
    gap: float
    kept: int = 0
    swaps: int = 0
    kept_gap: float = 0.0


class _Forced(LogitsProcessor):
    """Makes `generate` produce `ids`, and compares them with what it would have chosen."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.step, self.flips, self.gap = ids, 0, 0, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.ids[:, self.step, None]
        behind = (scores.amax(-1, keepdim=True) - scores.gather(-1, wanted)).double() / scores.double().std(-1)[:, None]
        self.flips += int((behind > 0).sum())
        self.gap = max(self.gap, float(behind.max()))
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(-1, wanted, 0.0)


def compare(runner: Runner, reference: Runner, inputs: Mapping[str, torch.Tensor], tokens: int) -> Verdict:
    """Generate with `runner`, then make `reference` keep and generate the same tokens, and see how it ranks them.

    A kept visual token more or less changes all that follows, so each decision is judged after the same ones before it.

    Raises:
        MMEfficientError: too few tokens, or one that the reference ranks too low for low precision to explain.
    """
    for _ in range(2):  # the second is the one that an engine may have recorded
        ids = runner.generate(inputs, tokens)
    if ids.shape != (rows := len(inputs["input_ids"]), tokens):
        raise MMEfficientError(f"{runner} gave ids of shape {tuple(ids.shape)} instead of {(rows, tokens)}.")
    picks, forced = Picks(), _Forced(ids)
    if runner.plan and runner.run is not None:
        told = picks.told(reference.plan, runner.run.report())
        reference = Runner(reference.model, reference.engine, told, reference.tokenizer)
    again = reference.generate(inputs, tokens, logits_processor=[forced])
    limit = LIMITS[runner.model.dtype]
    if not picks.gap <= limit:
        raise MMEfficientError(
            f"{runner} kept a visual token that {reference} scores {picks.gap:.3g} standard deviations below its own, "
            f"more than the {limit} that {runner.model.dtype} explains; it was not timed. Please report this."
        )
    if not torch.equal(again, ids) or not forced.gap <= limit:
        raise MMEfficientError(
            f"{runner} chose a token {forced.gap:.3g} standard deviations below the best of {reference}, more than the "
            f"{limit} that {runner.model.dtype} explains; it was not timed. Please report this."
        )
    return Verdict(ids.numel(), forced.flips, forced.gap, picks.kept, picks.swaps, picks.gap)


def verdicts(runners: list[Runner], inputs: Mapping[str, torch.Tensor], tokens: int) -> dict[Runner, Any]:
    """Compare each runner with stock `generate`, or under a plan with the attached engine, timed or not.

    A `Verdict`, or the error that says why it failed.
    """
    found: dict[Runner, Any] = {}
    for runner in runners:
        trusted = ATTACHED if runner.plan else STOCK
        try:
            found[runner] = compare(
                runner, Runner(runner.model, trusted, runner.plan, runner.tokenizer), inputs, tokens
            )
        except Exception as error:
            found[runner] = error
    return found
