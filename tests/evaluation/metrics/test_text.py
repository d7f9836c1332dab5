from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.accuracy import accuracy
from mmefficient.evaluation.metrics.text import drop_unfinished, normalise, repeats_ngram, words
from mmefficient.evaluation.task import Output, Record


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Top-Left.", "top left"),
        ("  three!\n", "three"),
        ("the dog’s", "the dog's"),
        ("'quoted'", "quoted"),
        ("snake_case", "snake case"),
        ("ÉTÉ 3", "été 3"),
        ("...", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_words_are_counted_without_punctuation() -> None:
    assert len(words("a dog, two cats and a bus.")) == 7


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("a b c d e f g h", False),
        ("a b c d e f g h A B C, D E F G H.", True),
        ("a b c d e f g a b c d e f g", False),
        ("dog " * 9, True),
        ("dog " * 8, False),
        ("", False),
    ],
)
def test_repeats_ngram(text: str, repeats: bool) -> None:
    assert repeats_ngram(text) is repeats


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog. A ca", "A dog."),
        ("A dog. A cat.", "A dog. A cat."),
        ("It costs 3.50 eur", "It costs 3.50"),
        ("Is it? No! May", "Is it? No!"),
        ("a dog and a tea", "a dog and a"),
        ("", ""),
    ],
)
def test_drop_unfinished(text: str, kept: str) -> None:
    assert drop_unfinished(text) == kept


def test_accuracy_accepts_any_of_the_answers() -> None:
    truths = [("3", "three"), ("top left",), ("left",), ("left",)]
    records = [Record(str(i), "k", "?", str(i), truth) for i, truth in enumerate(truths)]
    outputs = [Output("Three."), Output("top-left"), Output("to the left"), Output("")]
    ratio = accuracy(records, outputs)["accuracy"]
    assert ratio.numerator.tolist() == [1, 1, 0, 0]
    assert ratio.denominator.tolist() == [1, 1, 1, 1]
