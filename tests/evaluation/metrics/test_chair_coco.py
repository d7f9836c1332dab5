from __future__ import annotations

import sys
from types import ModuleType

import pytest

from mmefficient.errors import InputError
from mmefficient.evaluation.metrics.chair_coco import SYNONYMS, CocoLexicon, coco_lexicon, facts


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
    assert facts() == {"synonyms_sha256": "b685537b36fe21b7", "pairs_sha256": "c188474b5b4d745e"}


class Lemmatizer:
    def lemmatize(self, word: str, part: str) -> str:
        assert part in "anrv"
        return {("buses", "n"): "bus", ("women", "n"): "woman", ("skis", "n"): "ski", ("parked", "v"): "park"}.get(
            (word, part), word
        )


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that do what is known of the libraries at the words used here."""
    nltk, stem, pattern, english = (ModuleType(name) for name in ("nltk", "nltk.stem", "pattern", "pattern.en"))
    nltk.word_tokenize = str.split  # type: ignore[attr-defined]
    nltk.pos_tag = lambda words: [(word, "VBN" if word == "parked" else "NNS") for word in words]  # type: ignore[attr-defined]
    stem.WordNetLemmatizer = Lemmatizer  # type: ignore[attr-defined]
    found = {"bus": "bu", "buses": "bus", "men": "man", "women": "woman", "glass": "glas", "skis": "ski"}
    english.singularize = lambda word: found.get(word, word)  # type: ignore[attr-defined]
    for module in (nltk, stem, pattern, english):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("text", "tables", "pattern", "wordnet"),
    [
        ("A bus parked", ["bus"], [], ["bus"]),  # "bu" to pattern
        ("two buses", ["bus"], ["bus"], ["bus"]),
        ("men", ["person"], ["person"], []),  # a lemma of its own to WordNet
        ("women", ["person"], ["person"], ["person"]),
        ("a wine glass", ["wine glass"], ["wine glass"], ["wine glass"]),  # "wine glas" to pattern
    ],
)
def test_families_differ_where_they_are_known_to(
    text: str, tables: list[str], pattern: list[str], wordnet: list[str]
) -> None:
    assert CocoLexicon("tables").mentions(text) == tables
    assert CocoLexicon("pattern").mentions(text) == pattern
    assert CocoLexicon("wordnet").mentions(text) == wordnet


def test_a_family_without_its_library_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    for family in ("pattern", "wordnet"):
        with pytest.raises(InputError, match=f"family '{family}' needs .*pip install nltk"):
            CocoLexicon(family).mentions("a bus")


@pytest.mark.usefixtures("libraries")
def test_a_family_without_its_data_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(text: str) -> list[str]:
        raise LookupError("\n***\n  Resource punkt_tab not found.\n")

    monkeypatch.setattr(sys.modules["nltk"], "word_tokenize", missing)
    with pytest.raises(InputError, match=r"nltk\.downloader"):
        CocoLexicon("wordnet").mentions("a bus")
