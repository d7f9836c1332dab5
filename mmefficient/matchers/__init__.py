"""Matchers: what puts image patches and questions into one space, for methods that choose by the question.

A method names its matcher in a field, so that a plan stays text:

- `embeddings`: the language model's own input space; nothing to load, no text needed, every family.
- a folder or hub id of a CLIP checkpoint in transformers' format: the pair whose vision tower the model has.
- `open_clip:ARCHITECTURE` or `open_clip:ARCHITECTURE/PRETRAINED`: an open_clip model that looks at the pictures itself
  (`pip install 'mmefficient[clip]'`).
- any name given to `register`.
"""

from __future__ import annotations

from functools import lru_cache

from mmefficient.matchers.base import EMBEDDINGS, Matcher, Seen

__all__ = ["EMBEDDINGS", "Matcher", "Seen", "load", "register"]

_registered: dict[str, Matcher] = {}


def register(name: str, matcher: Matcher) -> None:
    """Make a matcher known to plans as `matcher=NAME`, in place of an earlier one of that name."""
    _registered[name] = matcher


def load(name: str) -> Matcher:
    """The matcher called `name`, loaded once.

    Raises:
        ModelError: it cannot be loaded; says why.
    """
    return _registered[name] if name in _registered else _load(name)


@lru_cache(maxsize=4)
def _load(name: str) -> Matcher:
    if name.startswith("open_clip:"):
        from mmefficient.matchers.open_clip import OpenClip

        return OpenClip.from_name(name.removeprefix("open_clip:"))
    from mmefficient.matchers.pair import ClipPair

    return ClipPair.from_pretrained(name)
