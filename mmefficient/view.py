"""The View point: the same prompt seen in another way, and what both logits say together.

A view is another picture, another text in front, or both, which the model then reads with a cache of its own after
every forward; or what shallower layers already say, which takes no second reading. The second cache hangs on the first,
never takes its place, and follows it when beams are reordered or drafts dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import DynamicCache

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.points import MatchTokens, Method
from mmefficient.tokens import TokenMap

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

SECOND = "_mmefficient_view"
MOVES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


@dataclass(frozen=True)
class Sight:
    """The pictures of a prompt, N of them.

    Attributes:
        pixels: what the image processor made, of any family's shape.
        black: a black pixel as the image processor makes it, per channel; empty where that is unknown.
        match: patches and questions per picture, if "match" is in the view's `needs`.
        look: where the questions look, and how well they go with their pictures (`matchers.Looker`), if "look" is.
    """

    pixels: torch.Tensor
    black: tuple[float, ...] = ()
    match: MatchTokens | None = None
    look: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class View(Method):
    """Which variant of the input also runs, and how logits are combined. Identity: no second stream."""

    point: ClassVar[str] = "view"
    many_turns: ClassVar[bool] = False  # the second stream needs whole prompts

    @property
    def watches(self) -> bool:
        return True  # every encoding must be seen, to be varied

    @property
    def words(self) -> str:
        """Text that the second stream reads before everything else; needs the tokenizer."""
        return ""

    def depths(self, layers: int) -> Sequence[int]:
        """Decoder layers, of `layers`, whose input stands for the second stream; none = a stream of its own."""
        return ()

    def pictures(self, sight: Sight) -> torch.Tensor:
        """The second stream's pixels; by default the first's."""
        return sight.pixels

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits to choose from, float32 [B, n, V].

        Args:
            own: logits of the first stream, float32 [B, n, V]; other: of the second, or [J, B, n, V] at J depths.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override combine")


@dataclass(eq=False)
class Second:
    """The second stream of one prompt: its cache, and the prompt's state, which tells it from other prompts'."""

    prompt: Any
    cache: DynamicCache


class _Thread(threading.local):
    def __init__(self) -> None:
        self.inside = False
        self.passed: dict[int, torch.Tensor] = {}


class Stream:
    """Runs one view beside one model. Holds no state of a call.

    Raises:
        PlanError: the view needs a tokenizer, or layers that the model does not have.
        ModelError: the view puts text in front, and positions here are no plain numbers.
    """

    def __init__(self, view: View, adapter: Adapter, tokenizer: Any) -> None:
        self.view, self.adapter = view, adapter
        self.depths = tuple(view.depths(len(adapter.layers)))
        if self.depths and not 0 <= min(self.depths) <= max(self.depths) < len(adapter.layers):
            raise PlanError(
                f"{view} looks at layers out of range; the model has layers 0 to {len(adapter.layers) - 1}."
            )
        self.front: list[int] = []
        if view.words:
            reads = getattr(tokenizer, "tokenizer", tokenizer)
            if reads is None:
                raise PlanError(f"{view} reads a text; ask through VLM, or pass tokenizer=... to Plan.apply.")
            if adapter.mrope:
                raise ModelError(
                    f"{view.name} moves the prompt, and positions here are (time, height, width) triplets."
                )
            self.front = reads(view.words, add_special_tokens=False)["input_ids"]
            self.bos = getattr(reads, "bos_token_id", None)
        self._thread = _Thread()

    @property
    def inside(self) -> bool:
        """Whether this thread is in the second stream now."""
        return self._thread.inside

    def passing(self, layer: int, hidden: torch.Tensor) -> None:
        """Note what enters a decoder layer, [B, n, D], if the view looks there."""
        if layer in self.depths:
            self._thread.passed[layer] = hidden

    def after(self, model: Any, kwargs: Mapping[str, Any], out: Any, prompt: Any, pictures: Mapping[str, Any]) -> Any:
        """`out` of a forward with its logits combined.

        Args:
            kwargs: of the forward; prompt: any object that stands for the prompt it reads or continues; pictures: the
                second stream's pixels and what goes with them, while the prompt is read; else empty.

        Raises:
            ModelError: the cache is of a kind that a second one cannot follow.
        """
        own = out.logits.float()
        other = self.shallow(model, own.shape[1]) if self.depths else self.beside(model, kwargs, out, prompt, pictures)
        out.logits = self.view.combine(own, other.float()).to(out.logits.dtype)
        return out

    def shallow(self, model: Any, rows: int) -> torch.Tensor:
        """Logits [J, B, rows, V] of the last rows, read off before the layers that the view looks at."""
        passed, self._thread.passed = self._thread.passed, {}
        norm, head = self.adapter.decoder.norm, model.get_output_embeddings()
        device = next(head.parameters()).device
        return torch.stack([head(norm(passed[layer][:, -rows:].to(device))) for layer in self.depths])

    def beside(
        self, model: Any, kwargs: Mapping[str, Any], out: Any, prompt: Any, pictures: Mapping[str, Any]
    ) -> torch.Tensor:
        """Logits [B, n, V] of the second stream."""
        again = {name: value for name, value in kwargs.items() if name != "mm_encoder_outputs"} | dict(pictures)
        cache = out.past_key_values
        reads = True
        if cache is not None:
            again["past_key_values"] = second = self.second(cache, prompt).cache
            reads = second.get_seq_length() == 0
        if self.front:
            again = self.moved(again, reads)
        self._thread.inside = True
        try:
            logits: torch.Tensor = model(**again).logits
        finally:
            self._thread.inside = False
        return logits[:, -out.logits.shape[1] :]

    def moved(self, again: Mapping[str, Any], reads: bool) -> dict[str, Any]:
        """The arguments of a forward after `front` was put before a row's text (but behind BOS), when it is read."""
        found, ids, count = dict(again), again["input_ids"], len(self.front)
        mask: torch.Tensor | None = again.get("attention_mask")
        if reads:
            mask = torch.ones_like(ids) if mask is None else mask
            start = mask.argmax(1, keepdim=True)  # padding is on the left
            start = start + (ids.gather(1, start) == (-1 if self.bos is None else self.bos))
            place = torch.arange(ids.shape[1] + count, device=ids.device) - start  # [B, n + count]
            new = (place >= 0) & (place < count)
            source = torch.where(place < 0, place + start, place + start - count).clamp(0, ids.shape[1] - 1)
            front = torch.tensor(self.front, device=ids.device)
            for name, filling in (("input_ids", front[place.clamp(0, count - 1)]), ("mm_token_type_ids", 0)):
                if found.get(name) is not None:
                    found[name] = torch.where(new, filling, found[name].gather(1, source))
        if mask is not None:
            found["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
        if reads:
            found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
        elif found.get("position_ids") is not None:
            found["position_ids"] = found["position_ids"] + count
        if found.get("cache_position") is not None:
            last = int(found["cache_position"][-1]) + count
            found["cache_position"] = torch.arange(last + 1 - found["input_ids"].shape[1], last + 1, device=ids.device)
        return found

    def second(self, cache: Any, prompt: Any) -> Second:
        """The second stream's cache for this prompt, new if the prompt is."""
        found: Second | None = getattr(cache, SECOND, None)
        if found is None or found.prompt is not prompt:
            if type(cache) is not DynamicCache:
                raise ModelError(
                    f"{self.view.name} needs the default cache (DynamicCache), not {type(cache).__name__}."
                )
            found = Second(prompt, DynamicCache(config=self.adapter.decoder.config))
            setattr(cache, SECOND, found)
            for name in MOVES:
                setattr(cache, name, _Both(name, cache, found.cache, len(self.front)))
        return found


class _Both:
    """A method of a cache that also moves the cache beside it, which holds `more` tokens."""

    def __init__(self, name: str, first: DynamicCache, second: DynamicCache, more: int) -> None:
        self.name, self.first, self.second, self.more = name, first, second, more

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for cache in (self.second, self.first):
            given = args
            if cache is self.second and self.name == "crop" and args and args[0] > 0:
                given = (args[0] + self.more, *args[1:])
            result = getattr(type(cache), self.name)(cache, *given, **kwargs)
        return result


def rows_of(tokens: TokenMap, repeats: int) -> list[int]:
    """The batch row of every picture; `repeats` equal rows stand for one prompt and its pictures."""
    counts = [int(row.max()) + 1 for row in tokens.image.cpu()[::repeats]]
    return [row * repeats for row, count in enumerate(counts) for _ in range(count)]


def matches(
    tokens: TokenMap, embeds: torch.Tensor, asks: torch.Tensor, repeats: int, matcher: str,
    found: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], bool] | None,
) -> MatchTokens:  # fmt: skip
    """Patches and questions per picture, [N, T, E] and [N, C, E].

    Args:
        tokens: of the prompt; embeds: the language model's input [B, S, D]; asks: bool [B, S], the question's tokens;
            repeats: equal rows that stand for one prompt.
        found: patches, texts and whether they are inverted, in the space of `matcher`; None = it is one of `OWN`.

    Raises:
        ModelError: the pictures do not have equally many patches.
    """
    rows = rows_of(tokens, repeats)
    if found is None:
        patches = embeds[::repeats][tokens.visual[::repeats].to(embeds.device)]
        most = int(asks.sum(1).max())
        place = asks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].to(embeds.device)
        words = embeds.gather(1, place[..., None].expand(-1, -1, embeds.shape[-1]))
        texts, match = (words, asks.to(embeds.device).gather(1, place)), partial(MatchTokens.embedded, matcher)
    else:
        patches, texts, inverted = found
        match = partial(MatchTokens, inverted=inverted)
    if len(patches) % len(rows):
        raise ModelError("the pictures differ in how many patches they have; give the view pictures of one size.")
    return match(patches.float().unflatten(0, (len(rows), -1)), texts[0][rows].float(), texts[1][rows])


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
