"""Scores by part of a set, besides those of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmefficient.evaluation.task import Output, Ratio, Record, Scorer, ratio


def by_category(scorer: Scorer, metric: str = "accuracy") -> Scorer:
    """`scorer`, and its `metric` for every `record.category` as "metric[category]"."""

    def score(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
        scores = scorer(records, outputs)
        whole = scores[metric]
        names = np.array([record.category.replace("/", "-") for record in records])
        for name in dict.fromkeys(names.tolist()):
            inside = names == name
            part = ratio(whole.numerator * inside, whole.denominator * inside, whole.unit)
            scores[f"{metric}[{name}]"] = part
        return scores

    return score
