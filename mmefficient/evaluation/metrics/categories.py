"""Scores by part of a set, besides those of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmefficient.evaluation.task import Output, Ratio, Record, Scorer, ratio


def by_category(scorer: Scorer, *metrics: str) -> Scorer:
    """`scorer`, and its `metrics` for every `record.category` as "metric[category]"."""

    def score(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
        scores = scorer(records, outputs)
        names = np.array([record.category.replace("/", "-") for record in records])
        for metric in metrics:
            whole = scores[metric]
            for name in dict.fromkeys(names.tolist()):
                inside = names == name
                scores[f"{metric}[{name}]"] = ratio(whole.numerator * inside, whole.denominator * inside, whole.unit)
        return scores

    return score
