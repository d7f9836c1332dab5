from __future__ import annotations

from mmefficient.evaluation.metrics.amber import amber
from mmefficient.evaluation.task import Output, Record


def test_no_is_the_positive_class() -> None:
    cases = [("yes", "Yes"), ("yes", "no."), ("no", "No"), ("no", "NO"), ("no", "Yes."), ("no", "No, there is not.")]
    records = [Record(str(i), "discriminative", "?", "p", (truth,)) for i, (truth, _) in enumerate(cases)]
    ratios = amber(records, [Output(said) for _, said in cases])
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums == {
        "accuracy": (3, 6),
        "precision": (2, 3),
        "recall": (2, 4),
        "f1": (4, 7),
        "no_rate": (3, 6),
        "other": (1, 6),
    }
