"""Hallucination on scenes: objects asked about and named in captions, in ordinary and in counterfactual scenes."""

from __future__ import annotations

from collections.abc import Sequence

from mmefficient.evaluation.task import Record, Task
from mmefficient.evaluation.tasks import scenes
from mmefficient.models.reference.scenes import splits

KINDS = (*splits.EXISTENCE_KINDS, "caption", "caption-counterfactual")


def task(split: str) -> Task:
    """The task on "test", "confirm" (2,000 questions of each kind of existence, 1,000 captions of each) or "val"."""

    def records(kinds: Sequence[str] | None, limit: int | None) -> list[Record]:
        return [scenes.record(question) for question in splits.load(split, kinds or KINDS, limit)]

    return Task(
        name="hallucination" if split == "test" else f"hallucination-{split}",
        kinds={
            kind: scenes.TASK.kinds[kind.removesuffix("-counterfactual") if "caption" in kind else kind]
            for kind in KINDS
        },
        records=records,
        pictures=scenes.TASK.pictures,
        groups={"existence": splits.EXISTENCE_KINDS[:3]},
    )


TASK = task("test")
