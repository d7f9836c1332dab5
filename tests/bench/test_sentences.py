"""The benchmark of checked sentences: how a margin is chosen, and what a run reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmefficient.bench import sentences
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.tasks.hallucination import task

RIGHT, WRONG, SHORT = "all", "too much", "too little"


class FakeAsker:
    def __init__(self) -> None:
        self.task = task("val")


def caption(record: Any, kind: str) -> str:
    names = list(record.truth)
    absent = next(name for name in ("dog", "cat", "bus", "cow", "zebra", "shoe") if name not in names)
    return ", ".join(f"a {name}" for name in {RIGHT: names, WRONG: [*names, absent], SHORT: names[1:]}[kind])


@pytest.mark.parametrize(
    ("kinds", "margin", "kept"),
    [
        ([WRONG, RIGHT, SHORT, SHORT, SHORT], 1.0, True),  # the least hallucination at full recall
        ([WRONG, WRONG, WRONG, SHORT, SHORT], 0.0, True),  # recall is not given away
        ([SHORT] * 5, 0.0, False),
    ],
)
def test_the_margin_is_the_best_that_keeps_recall(
    monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str], margin: float, kept: bool
) -> None:
    def answers(records: Sequence[Any], kind: str) -> list[Answer]:
        said = [caption(each, kind) if each.kind.startswith("caption") else "yes" for each in records]
        return [Answer(each.id, text, False, [1], 1, 1.0, 1.0) for each, text in zip(records, said, strict=True)]

    by_margin = dict(zip(sentences.MARGINS, kinds, strict=True))
    monkeypatch.setattr(sentences, "greedy", lambda asker, records, size: answers(records, WRONG))
    monkeypatch.setattr(
        sentences,
        "verified",
        lambda asker, records, before, margin, width, size: answers(records, by_margin[margin]),
    )
    asker: Any = FakeAsker()
    assert sentences.choose_margin(asker, 4, 4, 8)[:2] == (margin, kept)


def test_a_run_at_a_given_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "KINDS", ("existence-counterfactual", "caption-counterfactual"))
    result = sentences.run("reference-biased", None, margin=-99.0, limit=1, width=2, device="cpu", dtype="auto")
    assert result["validation"] is None
    none, same = result["test"]["plans"]
    assert same["metrics"] == none["metrics"]  # everything passes
    assert same["plan"] == "verify_sentences(margin=-99.0,width=2)"
    sentences.write(result, tmp_path)
    assert "Per caption: none:" in (tmp_path / "sentences.md").read_text()
    assert (tmp_path / "sentences.json").is_file()
