"""Share of answers that match an accepted answer."""

from __future__ import annotations

from collections.abc import Sequence

from mmefficient.evaluation.metrics.text import normalise
from mmefficient.evaluation.task import Output, Ratio, Record, ratio


def accuracy(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """An answer is right when it equals one of `record.truth`, case and punctuation aside."""
    right = [
        normalise(output.text) in {normalise(answer) for answer in record.truth}
        for record, output in zip(records, outputs, strict=True)
    ]
    return {"accuracy": ratio(right)}
