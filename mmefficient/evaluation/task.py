"""What an evaluation task is: records, pictures, generation settings and metrics, declared in one short file each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from torch import Tensor, device


@dataclass(frozen=True)
class Record:
    """One question about one picture.

    `picture` identifies the picture's content: records that share it are resampled together, and it enters the
    task's digest. `truth` is what the kind's scorer compares with (accepted answers, or the objects that are there).
    `source` is the task's own object from which the picture is made.
    """

    id: str
    kind: str
    question: str
    picture: str
    truth: tuple[str, ...]
    source: object = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Output:
    """A model's answer to one record; `truncated` when decoding stopped at the kind's `max_new_tokens`."""

    text: str
    truncated: bool = False


@dataclass(frozen=True)
class Ratio:
    """A metric as a ratio of sums: Σ numerator / Σ denominator over records (both [n]).

    Accuracy, precision, recall, F1 and both CHAIR scores have this form, so one bootstrap serves them all.
    `unit` is "share" (printed in percent) or the name of what is counted.
    """

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]
    unit: str = "share"


def ratio(numerator: ArrayLike, denominator: ArrayLike | None = None, unit: str = "share") -> Ratio:
    """A `Ratio` from numbers or truth values [n]; without a denominator every record counts once (a mean)."""
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, dtype=np.float64)
    return Ratio(top, bottom, unit)


Scorer = Callable[[Sequence[Record], Sequence[Output]], dict[str, Ratio]]


@dataclass(frozen=True)
class Kind:
    """How one kind of question is decoded (greedily, at most `max_new_tokens`) and scored."""

    max_new_tokens: int
    score: Scorer


@dataclass(frozen=True)
class Task:
    """A named evaluation.

    `records(kinds, limit)` returns the records in a fixed order (at most `limit` per kind); `pictures(records,
    device)` their pictures, either uint8 [B, 3, H, W] or B PIL images. `groups` names unweighted means over kinds:
    every metric that all members report is averaged under the group's name, provided that all members were evaluated.
    """

    name: str
    kinds: Mapping[str, Kind]
    records: Callable[[Sequence[str] | None, int | None], list[Record]]
    pictures: Callable[[Sequence[Record], device], Tensor | list[Image]]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def digest(records: Sequence[Record]) -> str:
    """Sha256 (hex) over ids, kinds, questions, pictures and truths, in order."""
    sha = hashlib.sha256()
    for record in records:
        row = [record.id, record.kind, record.question, record.picture, list(record.truth)]
        sha.update(json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return sha.hexdigest()
