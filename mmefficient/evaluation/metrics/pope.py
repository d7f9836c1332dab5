"""POPE's scores for yes/no questions about existence (Li et al. 2023, arXiv 2305.10355), with MCC.

Parser and conventions are those of the official evaluation script (RUCAIBox/POPE): "yes" is the positive class, and
whatever does not say "no" is a "yes", an empty answer included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmefficient.evaluation.metrics.text import words
from mmefficient.evaluation.task import Output, Ratio, Record, ratio

COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")


def says_yes(text: str) -> bool:
    """The official parser: the text before the first full stop, without commas, has none of No, no, not as a word."""
    return not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" "))


def pope(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """Accuracy, precision, recall, F1 = 2PR/(P+R) = 2TP/(2TP+FP+FN) and yes-rate; `record.truth[0]` is "yes" or "no".

    MCC is the correlation of answers and truth, which a shifted yes/no threshold alone does not raise much: as a ratio
    of sums, of z(answer) z(truth) over (z(answer)² + z(truth)²)/2, whose value and influence function are those of the
    correlation, so that its bootstrap interval is right to first order. Undefined where all answers agree.

    Two companions: the false-positive rate (with recall it tells a shifted threshold from better sight) and the share
    of answers that hold neither yes nor no, which the parser counts as "yes". Last the official script's four counts.
    """
    positive = np.array([record.truth[0] == "yes" for record in records], dtype=bool)
    yes = np.array([says_yes(output.text) for output in outputs], dtype=bool)
    vague = [not {"yes", "no", "not"} & set(words(output.text)) for output in outputs]
    hit, false_alarm, miss = yes & positive, yes & ~positive, ~yes & positive
    return {
        "accuracy": ratio(yes == positive),
        "precision": ratio(hit, yes),
        "recall": ratio(hit, positive),
        "f1": ratio(2.0 * hit, 2.0 * hit + false_alarm + miss),
        "mcc": _correlation(yes.astype(np.float64), positive.astype(np.float64)),
        "yes_rate": ratio(yes),
        "false_positive_rate": ratio(false_alarm, ~positive),
        "vague": ratio(vague),
        **{name: _count(where) for name, where in zip(COUNTS, (hit, false_alarm, ~yes & ~positive, miss), strict=True)},
    }


def _count(where: NDArray[np.bool_]) -> Ratio:
    return ratio(where, np.full(where.shape, 1 / len(where)), unit="questions")


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> Ratio:
    if not (a.std() and b.std()):
        return ratio(np.zeros_like(a), np.zeros_like(a))
    a, b = ((x - x.mean()) / x.std() for x in (a, b))
    return ratio(a * b, (a * a + b * b) / 2)
