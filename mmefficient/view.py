"""The View point: a second stream over the same prompt, with other pictures and a cache of its own.

After every forward of the model the same call is made again with the view's pictures, and both logits are combined
before anything is chosen. The second cache hangs on the first, never takes its place, and follows it when beams are
reordered or drafts dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from mmefficient.errors import InputError, ModelError
from mmefficient.points import Method

SECOND = "_mmefficient_view"
MOVES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


@dataclass(frozen=True)
class View(Method):
    """Which variant of the input also runs, and how logits are combined. Identity: no second stream."""

    point: ClassVar[str] = "view"
    many_turns: ClassVar[bool] = False  # the second stream needs whole prompts

    @property
    def watches(self) -> bool:
        return True  # every encoding must be seen, to be varied

    def pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """The second stream's pixels, from the first's: what the image processor makes, of any family's shape."""
        raise NotImplementedError(f"{type(self).__name__} does not override pictures")

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits to choose from, float32 [B, n, V], from those of the two streams."""
        raise NotImplementedError(f"{type(self).__name__} does not override combine")


@dataclass(eq=False)
class Second:
    """The second stream of one prompt: its cache, and the prompt's state, which tells it from other prompts'."""

    prompt: Any
    cache: DynamicCache


class Stream:
    """Runs one view beside one model. Holds no state of a call."""

    def __init__(self, view: View, config: Any) -> None:
        self.view, self.config = view, config
        self._thread = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is in the second stream now."""
        return getattr(self._thread, "inside", False)

    def after(self, model: Any, kwargs: Mapping[str, Any], out: Any, prompt: Any, pictures: Mapping[str, Any]) -> Any:
        """`out` of a forward with its logits combined.

        Args:
            kwargs: of the forward; prompt: any object that stands for the prompt it reads or continues.
            pictures: pixels and what goes with them, while the prompt is read; else empty.

        Raises:
            ModelError: the cache is of a kind that a second one cannot follow.
        """
        cache = out.past_key_values
        again = {name: value for name, value in kwargs.items() if name != "mm_encoder_outputs"}
        if pictures:
            again |= {**pictures, "pixel_values": self.view.pictures(pictures["pixel_values"])}
        if cache is not None:
            again["past_key_values"] = self.second(cache, prompt).cache
        self._thread.inside = True
        try:
            other = model(**again)
        finally:
            self._thread.inside = False
        combined = self.view.combine(out.logits.float(), other.logits.float())
        out.logits = combined.to(out.logits.dtype)
        return out

    def second(self, cache: Any, prompt: Any) -> Second:
        """The second stream's cache for this prompt, new if the prompt is."""
        found: Second | None = getattr(cache, SECOND, None)
        if found is None or found.prompt is not prompt:
            if type(cache) is not DynamicCache:
                raise ModelError(
                    f"{self.view.name} needs the default cache (DynamicCache), not {type(cache).__name__}."
                )
            found = Second(prompt, DynamicCache(config=self.config))
            setattr(cache, SECOND, found)
            for name in MOVES:
                setattr(cache, name, _Both(name, cache, found.cache))
        return found


class _Both:
    """A method of a cache that also moves the cache beside it."""

    def __init__(self, name: str, first: DynamicCache, second: DynamicCache) -> None:
        self.name, self.first, self.second = name, first, second

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for cache in (self.second, self.first):
            result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        return result


def repeated(pictures: Mapping[str, Any], rows: int, repeats: int) -> dict[str, Any]:
    """Pictures of a prompt whose rows `generate` repeated after encoding (beams, several samples).

    Raises:
        InputError: not every row has one picture, so that it is unknown whose are to be repeated.
    """
    if repeats == 1:
        return dict(pictures)
    if len(pictures["pixel_values"]) * repeats != rows:
        raise InputError("beams with a view need exactly one picture in every prompt; use one prompt at a time.")
    return {
        name: value.repeat_interleave(repeats, 0) if torch.is_tensor(value) else value
        for name, value in pictures.items()
    }
