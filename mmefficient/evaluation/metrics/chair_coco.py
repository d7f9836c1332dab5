"""The objects of COCO that a text mentions, with CHAIR's synonym table (Rohrbach et al. 2018, arXiv 1809.02156).

`data/chair_synonyms.txt` is the table in circulation with its quirks: leading blanks (" motor bike") and a capital
("iPhone") keep some entries from ever matching. The steps are those of the published evaluators but for
the singular: those use a library (`pattern` in the original, NLTK's tagger and WordNet in the versions of OPERA, PAI
and VISTA) that differ from one another; here a plural is what the regular rules, or `_IRREGULAR`, make of a word in the
tables. So "bus" is found, which `pattern` misses, and "men", which WordNet misses.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_IRREGULAR = {"goose": "geese", "mouse": "mice", "calf": "calves", "knife": "knives", "thief": "thieves"}
_IRREGULAR |= {"doberman": "dobermans"}
_INVARIANT = {"sheep", "cattle", "oxen", "people", "children", "skis", "scissors", "aircraft", "watercraft", "luggage"}

_DATA = Path(__file__).parent / "data"
SYNONYMS, PAIRS = _DATA / "chair_synonyms.txt", _DATA / "chair_pairs.txt"


class CocoLexicon:
    """Finds the nodes of the synonym table in text."""

    def __init__(self) -> None:
        lines = SYNONYMS.read_text(encoding="utf-8").splitlines()
        table = [line.strip().split(", ") for line in lines]
        self.nodes = {word: words[0] for words in table for word in words}
        self._pairs = _pairs()
        known = {part for entry in (*self.nodes, *self._pairs) for part in entry.split()} - _INVARIANT
        self._singular = {_plural(word): word for word in sorted(known) if _plural(word) not in self.nodes}

    def mentions(self, text: str) -> list[str]:
        """Nodes in order of mention, with repeats."""
        tokens = [self._singular.get(token, token) for token in _TOKEN.findall(text.lower())]
        merged = self._merge(tokens)
        if "toilet" in merged and "seat" in merged:
            merged = [word for word in merged if word != "seat"]
        return [self.nodes[word] for word in merged if word in self.nodes]

    def _merge(self, tokens: list[str]) -> list[str]:
        """Two-word names as one token, from left to right."""
        merged, start = [], 0
        while start < len(tokens):
            pair = self._pairs.get(" ".join(tokens[start : start + 2]))
            merged.append(tokens[start] if pair is None else pair)
            start += 1 if pair is None else 2
        return merged


@cache
def coco_lexicon() -> CocoLexicon:
    """The lexicon, read once."""
    return CocoLexicon()


def facts() -> dict[str, str]:
    """What a report says about the scorer."""
    return {
        "synonyms_sha256": hashlib.sha256(SYNONYMS.read_bytes()).hexdigest()[:16],
        "pairs_sha256": hashlib.sha256(repr(sorted(_pairs().items())).encode()).hexdigest()[:16],
        "singulars": "regular plurals of the tables' words",
    }


def _pairs() -> dict[str, str]:
    """Two-word names and the word that each is treated as."""
    return {
        **{pair: pair for pair in PAIRS.read_text(encoding="utf-8").splitlines()},
        **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
        **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
        "bow tie": "tie",
        "toilet seat": "toilet",
    }


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man"):
        return f"{word[:-3]}men"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"
