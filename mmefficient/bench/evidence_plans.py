"""Which plans the evidence table compares: every method at every budget, by the site where it acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUDGETS = (0.5, 0.25, 0.1111, 0.0556)
"""Shares of the visual tokens; of 576 they leave 288, 144, 64 and 32."""

PRUNED = ("fastervlm", "vispruner", "divprune", "scope", "hiprune", "prumerge", "tome")
MATCHED, MATCHERS = ("trim", "cdpruner"), ("words", "embeddings")
"""By the question, in the model's own input space: the embedded model has no text tower that goes with its images."""
BIASES = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Entry:
    """One plan of the table; `budget` is the share it was set to keep from its (last) site on, None = it decides."""

    site: str
    plan: str
    budget: float | None


def entries(layers: int, budgets: Sequence[float] = BUDGETS) -> list[Entry]:
    """All plans for a model of `layers` decoder layers.

    Methods that close up position ids by default run a second time with `positions=keep`: which of the two a model can
    read is a property of the model. Stages of in-model methods fall geometrically to the budget. Models of other depths
    have the same list, with layers at the same shares of the depth.
    """
    found = []
    for share in budgets:
        for plan in (f"random(keep={share})", *(f"{name}(keep={share})" for name in ("grid", "pool", "downsample"))):
            found.append(Entry("baselines", plan, share))
        dominant, contextual = round(share * 54 / 64, 4), round(share * 10 / 64, 4)
        before = [f"{name}(keep={share}" for name in PRUNED]
        before += [f"{name}(keep={share},matcher={matcher}" for name in MATCHED for matcher in MATCHERS]
        before.append(f"visionzip(dominant={dominant},contextual={contextual}")
        for plan in before:
            found += [Entry("before the language model", f"{plan}{end}", share) for end in (")", ",positions=keep)")]
        stages = tuple(round(share ** (stage / 3), 4) for stage in (1, 2, 3))
        early = max(1, round(layers / 16))
        inside = [f"fastv(layer={layer},keep={share})" for layer in (early + 1, layers // 3, layers // 2)]
        inside += [f"dart(layer={early + 1},keep={share})", f"pyramiddrop(shares={stages})"]
        inside += [f"sparsevlm(shares={stages})", f"sparsevlm(shares={stages},recycle=0)"]
        inside.append(f"pact(layer={2 * early},keep={min(1.0, round(1.1 * share, 4))})")
        found += [Entry("in the language model", plan, share) for plan in inside]
    exits = [f"exit(layer={round(layers * twelfth / 12)})" for twelfth in range(4, 12)]
    exits += ["exit(layer=auto)", *(f"dyvte(bias={bias})" for bias in BIASES), "fastv(keep=0.5)+dyvte(bias=0.0)"]
    return [*found, *(Entry("exit", plan, None) for plan in exits)]
