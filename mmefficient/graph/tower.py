"""What a vision tower may leave out where nobody wants more of it than the projector's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.activations import QuickGELUActivation

from mmefficient.errors import ModelError

if TYPE_CHECKING:
    from mmefficient.vision import Watcher


@contextmanager
def lean_tower(watcher: Watcher, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Run no tower layer behind the last one that is read, by the projector or by `watcher`, and reuse memory.

    Layers that do not run hand on what they are given, so their places in the tower's outputs stay. The projector's
    output is the same to the bit. Where somebody has put another forward, it runs.

    Args:
        arguments: of the encoder; one that chooses layers itself gets all of them.
    """
    instead = dict(_instead(watcher, arguments))
    if any("forward" in vars(module) for module in instead):
        instead = {}
    for module, forward in instead.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in instead:
            del module.__dict__["forward"]


def _instead(watcher: Watcher, arguments: Mapping[str, Any]) -> Iterator[tuple[torch.nn.Module, Callable[..., Any]]]:
    # a matcher looks at the tower itself
    if watcher.matchers or arguments.get("vision_feature_layer") is not None:
        return
    try:
        layers, deepest = watcher.adapter.tower_layers()
    except ModelError:  # no such tower, or the projector reads several layers
        return
    watched = set(map(id, watcher.attentions.values()))
    for index, layer in enumerate(layers):
        if not watched.isdisjoint(map(id, layer.children())):
            deepest = max(deepest, index)
    for layer in layers[: deepest + 1]:
        yield from ((each, _quick_gelu) for each in layer.modules() if type(each) is QuickGELUActivation)
    yield from ((layer, _hand_on) for layer in layers[deepest + 1 :])


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x) in one piece of memory instead of three."""
    return (1.702 * x).sigmoid_().mul_(x)
