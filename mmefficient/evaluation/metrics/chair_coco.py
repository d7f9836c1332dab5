"""The objects of COCO that a text mentions, with CHAIR's synonym table (Rohrbach et al. 2018, arXiv 1809.02156).

`data/chair_synonyms.txt` is the table in circulation with its quirks: leading blanks (" motor bike") and a capital
("iPhone") keep some entries from ever matching. Evaluators differ in how they find singulars, so there are families:

- "tables", needing no library: a plural is what the regular rules, or `_IRREGULAR`, make of a word in the tables. So
  "bus" is found, which the next family misses, and "men", which the last one misses;
- "pattern", the original's and the stand-alone evaluator's: `pattern.en.singularize`, which makes "bus" into "bu";
- "wordnet", that of OPERA, PAI, VISTA, SPIN and lmms-eval: NLTK's tagger and WordNet, which leaves "men" as it is.

Numbers of different families must not be compared: see docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

from mmefficient.errors import InputError

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_IRREGULAR = {"goose": "geese", "mouse": "mice", "calf": "calves", "knife": "knives", "thief": "thieves"}
_IRREGULAR |= {"doberman": "dobermans"}
_INVARIANT = {"sheep", "cattle", "oxen", "people", "children", "skis", "scissors", "aircraft", "watercraft", "luggage"}

_DATA = Path(__file__).parent / "data"
SYNONYMS, PAIRS = _DATA / "chair_synonyms.txt", _DATA / "chair_pairs.txt"


class CocoLexicon:
    """Finds the nodes of the synonym table in text, as one family of evaluators does."""

    def __init__(self, family: str = "tables") -> None:
        lines = SYNONYMS.read_text(encoding="utf-8").splitlines()
        table = [line.strip().split(", ") for line in lines]
        self.nodes = {word: words[0] for words in table for word in words}
        self.family = family
        self._pairs = _pairs() | ({"wine glas": "wine glass"} if family == "pattern" else {})

    def mentions(self, text: str) -> list[str]:
        """Nodes in order of mention, with repeats.

        Raises:
            InputError: the family's library, or its data, is not installed.
        """
        merged = self._merge(self._singulars(text.lower()))
        if "toilet" in merged and "seat" in merged:
            merged = [word for word in merged if word != "seat"]
        return [self.nodes[word] for word in merged if word in self.nodes]

    @cached_property
    def _singulars(self) -> Callable[[str], list[str]]:
        """Cuts lower-case text into words, and makes each singular."""
        if self.family != "tables":
            return _guarded(self.family)
        known = {part for entry in (*self.nodes, *self._pairs) for part in entry.split()} - _INVARIANT
        singular = {_plural(word): word for word in sorted(known) if _plural(word) not in self.nodes}
        return lambda text: [singular.get(token, token) for token in _TOKEN.findall(text)]

    def _merge(self, tokens: list[str]) -> list[str]:
        """Two-word names as one token, from left to right."""
        merged, start = [], 0
        while start < len(tokens):
            pair = self._pairs.get(" ".join(tokens[start : start + 2]))
            merged.append(tokens[start] if pair is None else pair)
            start += 1 if pair is None else 2
        return merged


@cache
def coco_lexicon(family: str = "tables") -> CocoLexicon:
    """The lexicon of a family, read once."""
    return CocoLexicon(family)


def facts() -> dict[str, str]:
    """What a report says about the tables."""
    return {
        "synonyms_sha256": hashlib.sha256(SYNONYMS.read_bytes()).hexdigest()[:16],
        "pairs_sha256": hashlib.sha256(repr(sorted(_pairs().items())).encode()).hexdigest()[:16],
    }


def _guarded(family: str) -> Callable[[str], list[str]]:
    """A library's words, whose absence is one sentence."""
    wanted = "nltk pattern" if family == "pattern" else "nltk"

    def singulars(text: str) -> list[str]:
        try:
            return {"pattern": _by_pattern, "wordnet": _by_wordnet}[family](text)
        except ImportError as error:
            raise InputError(f"CHAIR's family {family!r} needs {error.name}; pip install {wanted}.") from None
        except LookupError as error:
            raise InputError(
                f"CHAIR's family {family!r} needs data of NLTK ({str(error).strip().splitlines()[0].strip(' *')}); "
                "run python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet."
            ) from None

    return singulars


def _by_pattern(text: str) -> list[str]:
    from nltk import word_tokenize
    from pattern.en import singularize

    return [singularize(word) for word in word_tokenize(text)]


def _by_wordnet(text: str) -> list[str]:
    from nltk import pos_tag, word_tokenize
    from nltk.stem import WordNetLemmatizer

    lemmatizer, parts = WordNetLemmatizer(), {"J": "a", "V": "v", "R": "r"}
    return [lemmatizer.lemmatize(word, parts.get(tag[:1], "n")) for word, tag in pos_tag(word_tokenize(text))]


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
