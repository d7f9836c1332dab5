"""Layers of a vision tower that nobody reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.errors import ModelError

if TYPE_CHECKING:
    from mmefficient.vision import Watcher


@contextmanager
def read_layers_only(watcher: Watcher, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Run no tower layer behind the last one that is read, by the projector or by `watcher`.

    Such layers hand on what they are given, so their places in the tower's outputs stay. Only for callers that want
    nothing but the projector's output.

    Args:
        arguments: of the encoder; one that chooses layers itself gets all of them.
    """
    unread = [] if arguments.get("vision_feature_layer") is not None else _unread(watcher)
    for layer in unread:
        layer.__dict__["forward"] = _hand_on
    try:
        yield
    finally:
        for layer in unread:
            del layer.__dict__["forward"]


def _unread(watcher: Watcher) -> list[Any]:
    try:
        layers, deepest = watcher.adapter.tower_layers()
    except ModelError:  # no such tower, or the projector reads several layers
        return []
    watched = set(map(id, watcher.attentions.values()))
    for index, layer in enumerate(layers):
        if not watched.isdisjoint(map(id, layer.children())):
            deepest = max(deepest, index)
    unread = list(layers[deepest + 1 :])
    # a matcher looks at the tower itself; and what somebody else has put in a layer's place is theirs
    return [] if watcher.matchers or any("forward" in vars(layer) for layer in unread) else unread


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states
