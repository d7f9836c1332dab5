"""An answer in pieces, while another thread generates it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def pieces(generate: Callable[[dict[str, Any]], None], tokenizer: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield text as `generate` makes it; what it raises is raised at the end, and closing the iterator stops it.

    Args:
        generate: called in a thread of its own with `options` for `model.generate`, streamer and stop included.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = threading.Event()
    failures: list[BaseException] = []
    stopping = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), _StopWhen(closed)])
    given = {**options, "streamer": streamer, "stopping_criteria": stopping}

    def work() -> None:
        try:
            generate(given)
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.end()

    worker = threading.Thread(target=work, name="mmefficient-stream", daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        worker.join()
    if failures:
        raise failures[0]


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
