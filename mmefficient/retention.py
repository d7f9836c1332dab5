"""What the vision tower made of a conversation's pictures, kept on the host from one turn to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

if TYPE_CHECKING:
    from mmefficient.vision import Tower

HOST = torch.device("cpu")


class Retained:
    """Visual tokens and tower facts of one conversation, in host memory; a turn with the same pictures encodes nothing.

    All tokens are there, also those that an earlier question dropped: the plan's reducers choose among them anew.
    """

    def __init__(self) -> None:
        self._plan = ""
        self._pictures: list[Any] = []
        self._kept: dict[str, tuple[list[torch.Tensor], Tower | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        tensors = [x for features, tower in self._kept.values() for x in (*features, *_facts(tower).values())]
        return sum(x.nbytes for x in tensors)

    @contextmanager
    def turn(self, plan: str, pictures: Sequence[Any]) -> Iterator[None]:
        """Encoder calls of this thread are answered from here; other pictures (objects) or another plan start anew."""
        same = len(pictures) == len(self._pictures) and all(
            a is b for a, b in zip(pictures, self._pictures, strict=True)
        )
        if not same or plan != self._plan:
            self._plan, self._pictures, self._kept = plan, list(pictures), {}
        _here.retained = self
        try:
            yield
        finally:
            _here.retained = None

    def recall(
        self, kind: str, encode: Callable[[], tuple[Any, Tower | None]], device: torch.device
    ) -> tuple[Any, Tower | None]:
        """What `encode` returned for pictures of this `kind`, with its tensors on `device`."""
        if kind in self._kept:
            features, facts = self._kept[kind]
            out = BaseModelOutputWithPooling(pooler_output=[each.to(device) for each in features])
            return out, _moved(facts, device)
        out, tower = encode()
        made = getattr(out, "pooler_output", None)
        if made is not None:
            self._kept[kind] = [each.to(HOST, copy=True) for each in made], _moved(tower, HOST)
        return out, tower


class _Here(threading.local):
    retained: Retained | None = None


_here = _Here()


def retained() -> Retained | None:
    """Whose turn it is on this thread."""
    return _here.retained


def _facts(tower: Tower | None) -> dict[str, torch.Tensor]:
    return {} if tower is None else tower.tensors()


def _moved(tower: Tower | None, device: torch.device) -> Tower | None:
    return None if tower is None else tower.like({name: x.to(device, copy=True) for name, x in _facts(tower).items()})
