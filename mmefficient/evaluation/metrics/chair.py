"""CHAIR: objects that a caption mentions and the picture does not hold (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from mmefficient.evaluation.metrics.text import drop_unfinished, repeats_ngram, words
from mmefficient.evaluation.task import Output, Ratio, Record, Scorer, ratio


class Lexicon:
    """Finds object classes in text by the longest match over their forms, so "hot dog" does not mention "dog"."""

    def __init__(self, forms: Mapping[str, Iterable[str]]) -> None:
        """`forms`: class name -> the ways to say it (singular, plural, synonyms); the name itself is always one."""
        self._classes = {
            tuple(words(form)): name for name, more in forms.items() for form in dict.fromkeys([name, *more])
        }
        self._longest = max(map(len, self._classes), default=0)

    def mentions(self, text: str) -> list[str]:
        """Class names in order of mention, with repeats."""
        tokens, found, start = words(text), [], 0
        while start < len(tokens):
            for length in range(min(self._longest, len(tokens) - start), 0, -1):
                name = self._classes.get(tuple(tokens[start : start + length]))
                if name is not None:
                    found.append(name)
                    start += length
                    break
            else:
                start += 1
        return found


class Mentions(Protocol):
    """Whatever finds object classes in text."""

    def mentions(self, text: str) -> list[str]:
        """Class names in order of mention, with repeats."""
        ...


def chair(lexicon: Mentions) -> Scorer:
    """A scorer of captions against `record.truth`, the names of the object classes in the picture.

    chair_s: captions with at least one hallucinated mention / captions; chair_i: hallucinated mentions / mentions;
    recall: present classes that are mentioned / present classes (all pooled over captions). Captions that hit the
    length limit lose their unfinished last sentence before mentions are counted. Length (words) and the share of
    captions that repeat an 8-gram are those of the whole text: CHAIR grows with length, and empty captions are clean,
    so the scores mean nothing without these companions.
    """

    def score(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
        wrong, mentioned, recalled, present = [], [], [], []
        for record, output in zip(records, outputs, strict=True):
            found = lexicon.mentions(drop_unfinished(output.text) if output.truncated else output.text)
            truth = set(record.truth)
            wrong.append(sum(name not in truth for name in found))
            mentioned.append(len(found))
            recalled.append(len(truth.intersection(found)))
            present.append(len(truth))
        return {
            "chair_s": ratio([count > 0 for count in wrong], better="lower"),
            "chair_i": ratio(wrong, mentioned, better="lower"),
            "recall": ratio(recalled, present),
            "length": ratio([len(words(output.text)) for output in outputs], unit="words"),
            "repeated_8gram": ratio([repeats_ngram(output.text) for output in outputs]),
            "truncated": ratio([output.truncated for output in outputs]),
            "without_objects": ratio([count == 0 for count in mentioned]),
        }

    return score
