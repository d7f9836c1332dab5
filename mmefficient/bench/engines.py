"""The ways to generate that benchmarks compare: stock transformers as deployed, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StaticCache

from mmefficient.errors import InputError
from mmefficient.plan import Plan
from mmefficient.run import Run

ROOM = 64
"""Tokens that a static cache has left for the answer, at least; its length is a multiple."""


@dataclass(frozen=True)
class Engine:
    """One way to run `generate`.

    Attributes:
        ours: runs inside `Plan.apply`, also with the empty plan; stock engines carry no plan.
        apply: keywords of `Plan.apply`.
        static: with a `StaticCache` that is kept from call to call, for which transformers compiles decoding on CUDA. A
            new one every time would leave CUDA graphs that were recorded for an old one with addresses that are gone.
        device: the only device type it exists on; None = any.
        scores: reducers are called from Python in every call, so that their share can be timed.
    """

    name: str
    what: str
    ours: bool = False
    apply: Mapping[str, Any] = field(default_factory=dict)
    static: bool = False
    device: str | None = None
    scores: bool = False


STOCK = Engine("hf", "stock generate, default cache")
ATTACHED = Engine("eager", "ours, attached to the stock modules", ours=True, scores=True)
ENGINES = (
    STOCK,
    Engine(
        "hf-static",
        "stock generate with a StaticCache: decoding is compiled",
        static=True,
        device="cuda",
    ),
    ATTACHED,
    Engine("graph", "ours, recorded programs (CUDA graphs)", ours=True, apply={"engine": "graph"}, device="cuda"),
    Engine("auto", "ours, the same programs unrecorded", ours=True, apply={"engine": "auto"}, device="cpu"),
)


def choose(names: Sequence[str] | None, device: torch.device) -> list[Engine]:
    """The engines called `names`, or without names all that exist on `device`.

    Raises:
        InputError: no such engine, or not on this device.
    """
    here = {engine.name: engine for engine in ENGINES if engine.device in (None, device.type)}
    for name in names or []:
        if name not in here:
            raise InputError(f"There is no engine {name!r} on {device.type}; choose from {', '.join(here)}.")
    return [here[name] for name in names or here]


class Runner:
    """An engine with a plan on a model; `generate` is what gets timed.

    Attributes:
        tokenizer: for plans that read words.
        run: of the latest call; None for a stock engine.
    """

    def __init__(self, model: Any, engine: Engine, plan: Plan, tokenizer: Any = None) -> None:
        self.model, self.engine, self.plan, self.tokenizer = model, engine, plan, tokenizer
        self.run: Run | None = None
        self._compiled: Any = None
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def __str__(self) -> str:
        return f"{self.engine.name} {self.plan}"

    def attached(self) -> AbstractContextManager[Any]:
        """The plan on the model; gives None for a stock engine."""
        if not self.engine.ours:
            return nullcontext()
        return self.plan.apply(self.model, tokenizer=self.tokenizer, **self.engine.apply)

    def generate(self, inputs: Mapping[str, torch.Tensor], tokens: int, **options: Any) -> torch.Tensor:
        """int64 [B, tokens]: the greedy continuation of `inputs`, without the prompt."""
        if self._compiled is not None:  # a plan that another engine carried has thrown it away
            self.model.__dict__["_compiled_call"] = self._compiled
        if self.engine.static:
            options["past_key_values"] = self._cache(*inputs["input_ids"].shape)
        with self.attached() as self.run:
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **options)
        if not self.engine.ours:
            self._compiled = self.model.__dict__.pop("_compiled_call", None)
        return ids[:, inputs["input_ids"].shape[1] :]

    def _cache(self, batch: int, length: int) -> StaticCache:
        room = -(-length // ROOM) * ROOM + ROOM
        cache = self._caches.setdefault(
            (batch, room), StaticCache(self.model.config.get_text_config(decoder=True), max_cache_len=room)
        )
        cache.reset()
        return cache


def prepare(model: Any) -> None:
    """Let every row generate as many tokens as it is asked for, with the stock stopping criteria at work."""
    model.generation_config.eos_token_id = model.config.get_text_config().vocab_size  # one more than there are
    model.generation_config.pad_token_id = 0
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
