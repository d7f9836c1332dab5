"""A picture that a model has read once, for many questions: `VLM.encode` makes it, `VLM.ask` takes it as the picture.

Kept are the keys and values of the prompt up to its last visual token. Under a causal mask they know nothing of what
follows, unless the plan says otherwise (`Plan.reusable`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from mmefficient.errors import InputError, PlanError
from mmefficient.executor import STATE
from mmefficient.flops import layer_flops, pair_flops, token_flops
from mmefficient.masks import Segment
from mmefficient.models import adapter_for
from mmefficient.prompt import PromptState
from mmefficient.report import Report
from mmefficient.tokens import TokenMap

if TYPE_CHECKING:
    from mmefficient.plan import Plan

ROPE = "rope_deltas"
"""Where models with (time, height, width) positions note between calls how far text positions lag behind."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """One or several pictures of one prompt, as `model` read them under `plan`.

    Attributes:
        head: the prompt's text up to its last placeholder, that one excluded; ids: int64 [1, P], its tokens and the
            placeholders'; images: how many there are.
        cache: their keys and values; it is never written to.
        lag: the model's `rope_deltas`; None where positions are plain.
        report: of reading, with its times; FLOPs and tokens of the P tokens alone.
    """

    model: Any
    plan: Plan
    head: str
    ids: torch.Tensor
    images: int
    cache: Cache
    lag: torch.Tensor | None
    report: Report

    @property
    def alone(self) -> bool:
        """Whether questions are answered one by one: keys that count by size are kept for one row."""
        return bool(getattr(self.cache, STATE).steered)

    def asked(self, processor: Any, prompts: Sequence[str]) -> dict[str, Any]:
        """What `generate` takes to answer `prompts`, whole prompts as text; questions are padded behind the picture.

        Raises:
            InputError: a prompt does not begin like the picture's.
        """
        tails = []
        for prompt in prompts:
            head, _, tail = prompt.rpartition(processor.image_token)
            if head != self.head:
                raise InputError(
                    "this model's prompt puts the question before the picture, or the question holds a placeholder; "
                    "ask with the picture itself."
                )
            # with the placeholder before it, so that the text is split as in the whole prompt
            tails.append(processor.tokenizer(processor.image_token + tail, add_special_tokens=False).input_ids[1:])
        longest, device = max(map(len, tails)), self.ids.device
        gaps = torch.tensor([longest - len(tail) for tail in tails], device=device)[:, None]
        pad = processor.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(tail)) + tail for tail in tails], device=device)
        seen = torch.arange(longest, device=device) >= gaps
        before = self.ids.expand(len(tails), -1)
        if self.lag is not None:
            setattr(adapter_for(self.model).base, ROPE, self.lag)
        return {
            "input_ids": torch.cat([before, ids], 1),
            "attention_mask": torch.cat([torch.ones_like(before), seen.long()], 1),
            "past_key_values": self.rows(len(tails)),
        }

    def rows(self, count: int) -> Cache:
        """The cache for `count` questions; what is stored is shared, and copied when a layer first grows."""
        cache, layers = copy.copy(self.cache), []
        for layer in self.cache.layers:
            twin = copy.copy(layer)
            if twin.is_initialized:
                twin.keys, twin.values = (x.expand(count, -1, -1, -1) for x in (layer.keys, layer.values))
            layers.append(twin)
        cache.layers = layers
        setattr(cache, STATE, _repeated(getattr(cache, STATE), count))
        return cache

    def reported(self, report: Report, lengths: Sequence[int], config: Any) -> Report:
        """The report of an answer: what was computed for the questions, of `lengths` tokens, over what was kept.

        Args:
            report: what `Run.report` says, which is the picture's part of each row; config: of the text model.
        """
        layers = len(report.rows[0].kept_per_layer)
        held = report.stored_tokens // len(report.rows)  # summed over layers
        read = self.ids.shape[1]
        computed = sum(
            layers * t * token_flops(config) + (t * held + layers * t * t) * pair_flops(config) for t in lengths
        )
        return dataclasses.replace(
            report,
            prefill_flops=computed,
            prefill_flops_without_plan=sum(layers * layer_flops(config, read + t) for t in lengths),
            stored_tokens=report.stored_tokens + layers * sum(lengths),
            reused_tokens=held * len(lengths),
        )


def encode(model: Any, processor: Any, inputs: Any, prompt: str, plan: Plan, tokenizer: Any) -> Encoded:
    """Read a prompt's pictures.

    Args:
        inputs: the processor's, of a prompt of one row and without padding; prompt: its text.

    Raises:
        PlanError: under this plan visual rows depend on the question.
    """
    if not plan.reusable:
        (name, *_) = (each.name for each in plan.methods if not each.many_turns)
        raise PlanError(
            f"under {plan} what is kept of a picture depends on the question ({name}); ask with the picture itself."
        )
    adapter = adapter_for(model)
    length = inputs["input_ids"].shape[1]
    end = 1 + int((inputs["input_ids"][0] == adapter.placeholders["image"]).nonzero().max())
    cut = {
        name: value[:, :end] if torch.is_tensor(value) and value.shape == (1, length) else value
        for name, value in inputs.items()
    }
    if hasattr(adapter.base, ROPE):
        setattr(adapter.base, ROPE, None)
    with plan.apply(model, tokenizer=tokenizer) as run, torch.no_grad():
        cache = model(**cut, use_cache=True, logits_to_keep=1).past_key_values
    lag = getattr(adapter.base, ROPE, None)
    head = prompt.rpartition(processor.image_token)[0]
    images = prompt.count(processor.image_token)
    return Encoded(model, plan, head, cut["input_ids"], images, cache, lag, run.report())


def _repeated(state: PromptState, count: int) -> PromptState:
    """The state of one row as that of `count` equal ones."""
    old = state.tokens
    tokens = TokenMap(
        **{f.name: _rows_of(getattr(old, f.name), count, 1 if f.name == "position" else 0) for f in _FIELDS}
    )
    segments = {
        index: Segment(
            _rows_of(each.columns, count), None if each.valid is None else _rows_of(each.valid, count), each.length
        )
        for index, each in state.segments.items()
    }
    shift = None if state.shift is None else _rows_of(state.shift, count)
    return dataclasses.replace(state, tokens=tokens, segments=segments, shift=shift)


_FIELDS = dataclasses.fields(TokenMap)


def _rows_of(x: torch.Tensor, count: int, axis: int = 0) -> torch.Tensor:
    return x.repeat_interleave(count, axis)
