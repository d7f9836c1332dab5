"""Text measures shared by the scorers."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def words(text: str) -> list[str]:
    """Lower-case words of `text` without punctuation; a hyphen separates words."""
    return _WORD.findall(text.lower().replace("’", "'"))


def normalise(text: str) -> str:
    """`text` without case, punctuation and repeated spaces."""
    return " ".join(words(text))


def repeats_ngram(text: str, n: int = 8) -> bool:
    """Whether some sequence of `n` words occurs twice, the mark of a decoding loop."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def drop_unfinished(text: str) -> str:
    """`text` without its unfinished last sentence.

    Where no sentence was finished only the last word goes, which may be cut in half: dropping everything would turn a
    caption that never stops into an empty one, which CHAIR counts as clean.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text.rstrip().rpartition(" ")[0]
