"""Where the time of one answer goes: preprocess, vision, prefill, decode."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

STAGES = ("preprocess", "vision", "prefill", "decode")


class StageTimer:
    """A stopwatch that is always in exactly one stage, so the stages add up to the whole time inside the context.

        with StageTimer(model) as timer:
            with timer.preprocess():
                inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
            model.generate(**inputs)
        timer.stages_ms  # {"preprocess": ..., "vision": ..., "prefill": ..., "decode": ...}

    Stages, in milliseconds of wall time:

    * ``preprocess``: what runs under `preprocess()`; decoding and resizing the picture, chat template, tokenizer, copy
      to the device.
    * ``vision``: calls of the model's `get_image_features` and `get_video_features`: vision tower and projector. They
      happen inside the first forward or, from transformers 5.18 on, in `generate` before it; either way they are
      counted here only.
    * ``prefill``: the rest up to the end of the first forward: embedding, every decoder layer over the prompt, the
      language-model head, `generate`'s preparations and attaching a plan.
    * ``decode``: everything after that: later forwards, choosing tokens, streaming, detaching.

    A new `preprocess()` starts the next prompt, whose times are added to the same totals. On CUDA the devices that hold
    the model are synchronised at every boundary. Leaving the context removes all traces from the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stages_ms = dict.fromkeys(STAGES, 0.0)
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._undo: list[Callable[[], None]] = []
        self._stage = "prefill"
        self._since = 0.0

    def __enter__(self) -> StageTimer:
        base = getattr(self.model, "base_model", self.model)
        for name in ("get_image_features", "get_video_features"):
            if hasattr(base, name):
                self._wrap(base, name)
        self._undo.append(self.model.register_forward_hook(self._after_forward).remove)
        self._synchronise()
        self._stage, self._since = "prefill", time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enter_stage(self._stage)
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def preprocess(self) -> Iterator[None]:
        """Count the block as ``preprocess`` and what follows as the ``prefill`` of a new prompt."""
        self._enter_stage("preprocess")
        try:
            yield
        finally:
            self._enter_stage("prefill")

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())

    def _enter_stage(self, stage: str) -> None:
        self._synchronise()
        now = time.perf_counter()
        self.stages_ms[self._stage] += (now - self._since) * 1e3
        self._stage, self._since = stage, now

    def _synchronise(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _after_forward(self, *_: Any) -> None:
        if self._stage == "prefill":
            self._enter_stage("decode")

    def _wrap(self, owner: nn.Module, name: str) -> None:
        inner = getattr(owner, name)
        own = name in vars(owner)

        def restore() -> None:
            delattr(owner, name)
            if own:
                setattr(owner, name, inner)

        setattr(owner, name, Timed(inner, self))
        self._undo.append(restore)

    @contextmanager
    def vision(self) -> Iterator[None]:
        """Count the block as ``vision``."""
        outside = self._stage
        self._enter_stage("vision")
        try:
            yield
        finally:
            self._enter_stage(outside)


class Timed:
    """An encoder whose calls count as ``vision``; whoever replaces the call can still open the stage itself."""

    def __init__(self, inner: Callable[..., Any], timer: StageTimer) -> None:
        functools.update_wrapper(self, inner)
        self.stage = timer.vision

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.stage():
            return self.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]


def shares(stages_ms: dict[str, float]) -> dict[str, float]:
    """Each stage's part of the sum, in [0, 1]; zeros when nothing was timed."""
    total = sum(stages_ms.values())
    return {name: value / total if total else 0.0 for name, value in stages_ms.items()}
