"""AMBER's scores of its discriminative questions (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmefficient.evaluation.task import Output, Ratio, Record, ratio


def amber(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """Accuracy, precision, recall and F1 with "No" as the positive class; `record.truth[0]` is "yes" or "no".

    An answer counts when, without outer spaces, final stops and case, it is "yes" or "no"; any other is wrong, and
    counted in "other". F1 is 2PR/(P+R) of the exact P and R.
    """
    said = np.array([output.text.strip().rstrip(".").lower() for output in outputs], dtype=object)
    truth = np.array([record.truth[0] for record in records], dtype=object)
    no, positive = said == "no", truth == "no"
    return {
        "accuracy": ratio(said == truth),
        "precision": ratio(no & positive, no),
        "recall": ratio(no & positive, positive),
        "f1": ratio(2.0 * (no & positive), 1.0 * no + positive),
        "no_rate": ratio(no),
        "other": ratio([answer not in ("yes", "no") for answer in said]),
    }
