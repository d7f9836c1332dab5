from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.chair_coco import SYNONYMS, coco_lexicon, facts


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("A man and two women with three buses.", ["person", "person", "bus"]),
        ("people, children and a policeman", ["person", "person", "person"]),
        ("Hot dogs beside a dog", ["hot dog", "dog"]),
        ("two hot, dogs", ["dog"]),  # punctuation keeps words apart
        ("baby elephants and an adult bird", ["elephant", "bird"]),
        ("a baby", ["person"]),
        ("a passenger jet, a passenger", ["airplane", "person"]),
        ("the seat of the toilet", ["toilet"]),
        ("toilet seats", ["toilet"]),
        ("a seat by the window", ["chair"]),
        ("a bow tie", ["tie"]),
        ("home plate and train tracks", []),  # merged, so neither a plate nor a train
        ("motor bikes and motor cycles", ["motorcycle"]),  # " motor bike" has a blank in the table and never matches
        ("stove top oven", ["oven", "oven"]),  # three words never merge
        ("an iPhone", []),  # the table's capital never matches lower case
        ("cheesecake, pancakes", ["cake"]),
        ("wine glasses on the tables", ["wine glass", "dining table"]),
        ("knives, geese, mice, calves, puppies, benches", ["knife", "bird", "mouse", "cow", "dog", "bench"]),
        ("skis and a ski", ["skis", "skis"]),
        ("a scissor", []),
        ("The dog's bowl", ["dog", "bowl"]),
        ("teddy-bear", []),  # a hyphenated word is one word
        ("", []),
    ],
)
def test_mentions(text: str, mentions: list[str]) -> None:
    assert coco_lexicon().mentions(text) == mentions


def test_there_are_80_nodes() -> None:
    assert len(set(coco_lexicon().nodes.values())) == len(SYNONYMS.read_text().splitlines()) == 80


def test_the_tables_are_those_the_documentation_speaks_of() -> None:
    assert facts() == {
        "synonyms_sha256": "b685537b36fe21b7",
        "pairs_sha256": "c188474b5b4d745e",
        "singulars": "regular plurals of the tables' words",
    }
