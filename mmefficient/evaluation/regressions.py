"""The answers that a plan loses, with the picture and what the plan kept of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmefficient.draw import kept_tokens
from mmefficient.errors import InputError
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.generation import Asker
from mmefficient.evaluation.task import Output, Record, Task
from mmefficient.plan import Plan

SHOWN = 6
SIDE = 252  # px: longer side of a picture that is shown as it is


def worst(
    task: Task, records: Sequence[Record], before: Sequence[Answer], after: Sequence[Answer]
) -> list[dict[str, Any]]:
    """Up to `SHOWN` questions that `after` answers worse, by the first metric of their kind.

    Kinds take turns, the one that lost most in all first; within a kind the largest losses come first.
    """
    losses: dict[str, list[tuple[float, int]]] = {}
    for kind in dict.fromkeys(record.kind for record in records):
        asked = [i for i, record in enumerate(records) if record.kind == kind]
        good, bad = (_scores(task, kind, records, asked, answers) for answers in (before, after))
        lost = [(float(loss), i) for loss, i in zip(good - bad, asked, strict=True) if loss > 0]
        losses[kind] = sorted(lost, key=lambda pair: -pair[0])
    order = sorted(losses, key=lambda kind: -sum(loss for loss, _ in losses[kind]))
    turns = [losses[kind][turn : turn + 1] for turn in range(SHOWN) for kind in order]
    chosen = [i for turn in turns for _, i in turn][:SHOWN]
    return [
        {
            "id": records[i].id,
            "kind": records[i].kind,
            "question": records[i].question,
            "truth": list(records[i].truth),
            "before": before[i].text,
            "after": after[i].text,
        }
        for i in chosen
    ]


def _scores(task: Task, kind: str, records: Sequence[Record], asked: Sequence[int], answers: Sequence[Answer]) -> Any:
    """Each question's own value of the kind's first metric, the higher the better; 0 where it is undefined."""
    outputs = [Output(answers[i].text, answers[i].truncated) for i in asked]
    first = next(iter(task.kinds[kind].score([records[i] for i in asked], outputs).values()))
    values = np.divide(first.numerator, first.denominator, out=np.zeros(len(asked)), where=first.denominator != 0)
    return values if first.better == "higher" else -values


def draw(
    asker: Asker, records: Sequence[Record], report: Mapping[str, Any], folder: Path
) -> dict[tuple[str, str], Path]:
    """Writes one PNG per regression of `report` to `folder`, unless it is there, and returns them by (plan, id)."""
    by_id = {record.id: record for record in records}
    found: dict[tuple[str, str], Path] = {}
    for entry in report["plans"]:
        plan, shown = entry["plan"], entry["regressions"]
        for lost in shown:
            name = hashlib.sha256(f"{plan} {lost['id']} {report['digest']}".encode()).hexdigest()[:16]
            found[plan, lost["id"]] = folder / f"{name}.png"
        missing = [lost for lost in shown if not found[plan, lost["id"]].exists()]
        if missing:
            folder.mkdir(exist_ok=True)
            with asker.under(Plan(plan)) as run:
                for lost in missing:
                    record = by_id[lost["id"]]
                    asker.ask([record], run)
                    _picture(asker, record, run.report(), lost["after"]).save(found[plan, lost["id"]])
    return found


def _picture(asker: Asker, record: Record, report: Any, text: str) -> Image.Image:
    picture = asker.task.pictures([record], torch.device("cpu"))[0]
    if torch.is_tensor(picture):
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
    try:
        return kept_tokens(picture, [(report, text)])
    except InputError:  # a picture that the model cuts into tiles: shown as it is
        picture.thumbnail((SIDE, SIDE))
        return picture
