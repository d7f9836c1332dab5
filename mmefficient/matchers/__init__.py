"""Matchers: what puts image patches and questions into one space, for methods that choose by the question.

A method names its matcher in a field, so that a plan stays text:

- `words`, `embeddings`: the language model's own input space, word by word or over the question as a whole; nothing to
  load, no text needed, every family.
- a folder or hub id of a CLIP checkpoint in transformers' format: the pair whose vision tower the model has.
- `open_clip:ARCHITECTURE` or `open_clip:ARCHITECTURE/PRETRAINED`: an open_clip model that looks at the pictures itself
  (`pip install 'mmefficient[clip]'`).
- `blip:FOLDER_OR_HUB_ID`: a BLIP image-text matching checkpoint, for `agla` alone.
- any name given to `register`.
"""

from __future__ import annotations

from functools import lru_cache

from mmefficient.errors import ModelError
from mmefficient.matchers.base import EMBEDDINGS, OWN, WORDS, Looker, Matcher, Seen

__all__ = ["BLIP", "EMBEDDINGS", "OWN", "WORDS", "Looker", "Matcher", "Seen", "load", "load_looker", "register"]

BLIP = "blip:"
_registered: dict[str, Matcher | Looker] = {}


def register(name: str, matcher: Matcher | Looker) -> None:
    """Make a matcher known to plans as `matcher=NAME`, in place of an earlier one of that name."""
    _registered[name] = matcher


def load(name: str) -> Matcher:
    """The matcher called `name`, loaded once.

    Raises:
        ModelError: it cannot be loaded, or has no space for patches; says why.
    """
    found = _find(name)
    if not isinstance(found, Matcher):
        raise ModelError(f"matcher={name!r} compares pictures, not patches, with questions; only agla can use it.")
    return found


def load_looker(name: str) -> Looker:
    """The same for one that looks at whole pictures."""
    found = _find(name)
    if not isinstance(found, Looker):
        raise ModelError(f"matcher={name!r} is registered as one that compares patches; give it another name.")
    return found


def _find(name: str) -> Matcher | Looker:
    return _registered[name] if name in _registered else _load(name)


@lru_cache(maxsize=4)
def _load(name: str) -> Matcher | Looker:
    if name.startswith(BLIP):
        from mmefficient.matchers.blip import BlipItm

        return BlipItm.from_pretrained(name.removeprefix(BLIP))
    if name.startswith("open_clip:"):
        from mmefficient.matchers.open_clip import OpenClip

        return OpenClip.from_name(name.removeprefix("open_clip:"))
    from mmefficient.matchers.pair import ClipPair

    return ClipPair.from_pretrained(name)
