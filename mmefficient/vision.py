"""What happens before the language model: image layouts, and the vision tower facts some methods ask for.

`generate` encodes images before the prefill (transformers >= 5.18) or inside it (5.17, and plain `forward`), on the
thread that runs the prefill. So what is seen here waits in thread-local storage until that prefill takes it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmefficient.attention import KEY
from mmefficient.errors import ModelError
from mmefficient.kernels.key_scores import key_scores
from mmefficient.tokens import Layout

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter


@dataclass(frozen=True)
class Tower:
    """Facts per tower patch, flattened over all crops of all images: features [M, Dv], attention [M], keys [M, d]."""

    features: torch.Tensor
    attention: torch.Tensor
    keys: torch.Tensor

    def to(self, device: torch.device) -> Tower:
        """The same facts on `device`."""
        return Tower(self.features.to(device), self.attention.to(device), self.keys.to(device))


@dataclass(frozen=True)
class Vision:
    """The images (or the videos) of one encoder call.

    Attributes:
        layouts: one per image.
        strides: for each image, the tower patches before it in `tower`.
        tower: None unless asked for.
    """

    layouts: list[Layout]
    strides: list[int]
    tower: Tower | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.pending: WeakKeyDictionary[Watcher, dict[str, Vision]] = WeakKeyDictionary()
        self.expecting: WeakKeyDictionary[Watcher, Callable[[str, Vision], None]] = WeakKeyDictionary()
        self.capture: dict[str, torch.Tensor] | None = None


_thread = _Thread()


class FeatureTap:
    """Stands in for a model's `get_image_features`: same signature, same result, right in a deepcopy of the model."""

    def __init__(self, watcher: Watcher, kind: str, stock: Callable[..., Any]) -> None:
        self.watcher, self.kind = watcher, kind
        self.__wrapped__ = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEY, None)
        return self.watcher.observe(self.kind, self.__wrapped__, args, kwargs)


class Watcher:
    """Observes the vision side of one model. Holds no state of a call."""

    def __init__(self, adapter: Adapter, tower: bool) -> None:
        self.adapter = adapter
        self.tower = adapter.tower_parts() if tower else None

    def attach(self) -> list[Callable[[], Any]]:
        """Start observing; returns the functions that undo it."""
        base, undo = self.adapter.base, list[Callable[[], Any]]()
        for kind in self.adapter.placeholders:
            name = f"get_{kind}_features"
            stock = getattr(base, name, None)
            if stock is not None:
                # the instance may carry somebody else's wrapper already
                restore = partial(base.__dict__.__setitem__, name, stock)
                undo.append(restore if name in base.__dict__ else partial(base.__dict__.pop, name))
                base.__dict__[name] = FeatureTap(self, kind, stock)
        if self.tower is not None:
            projector, attention = self.tower
            handles = [
                attention.q_proj.register_forward_hook(self.on_query),
                attention.k_proj.register_forward_hook(self.on_key),
                projector.register_forward_pre_hook(self.on_projector),
            ]
            undo += [handle.remove for handle in handles]
        return undo

    def on_query(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if _thread.capture is not None:
            _thread.capture["query"] = out

    def on_key(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if _thread.capture is not None:
            _thread.capture["key"] = out

    def on_projector(self, module: nn.Module, args: Any) -> None:
        if _thread.capture is not None:
            _thread.capture["features"] = args[0]

    def observe(self, kind: str, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the encoder and note what it was given and gave."""
        watch = kind == "image" and self.tower is not None
        _thread.capture = {} if watch else None
        try:
            out = stock(*args, **kwargs)
            seen = _thread.capture
        finally:
            _thread.capture = None
        features = getattr(out, "pooler_output", None)
        if features is None:  # asked for a tuple: not a call of generate or forward
            return out
        arguments = inspect.signature(stock).bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        layouts = self.adapter.layouts(kind, arguments, features)
        for layout, tokens in zip(layouts, features, strict=True):
            if len(layout) != len(tokens):
                raise ModelError(f"expected {len(layout)} tokens of a {kind} but the model made {len(tokens)}.")
        strides, tower = [0] * len(layouts), None
        if seen:
            crops = self.adapter.crops(arguments, len(layouts))
            tower = self.facts(seen)
            each = len(tower.features) // sum(crops)
            strides = [each * before for before in accumulate(crops, initial=0)][:-1]
        vision = Vision(layouts, strides, tower)
        _thread.pending.setdefault(self, {})[kind] = vision
        expecting = _thread.expecting.get(self)
        if expecting is not None:
            expecting(kind, vision)
        return out

    def facts(self, seen: dict[str, torch.Tensor]) -> Tower:
        """Turn captured activations, [crops, T, D] each, into facts per patch.

        Raises:
            ModelError: the tower's rows are not its features plus at most one CLS row.
        """
        assert self.tower is not None
        features, query, key = (seen[name] for name in ("features", "query", "key"))
        heads = self.tower[1].num_heads
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        lead = key.shape[2] - features.shape[1]
        if lead not in (0, 1) or key.shape[0] != features.shape[0]:
            raise ModelError("the vision tower's attention rows do not match its features; tower methods cannot run.")
        rows = query[:, :, :1] if lead else query
        scores = key_scores(rows, key, scale=key.shape[-1] ** -0.5).mean(1)
        return Tower(features.flatten(0, 1), scores[:, lead:].flatten(), key.mean(1)[:, lead:].flatten(0, 1))

    def expect(self, receive: Callable[[str, Vision], None]) -> None:
        """Call `receive` for encoder calls on this thread until `settle`."""
        _thread.expecting[self] = receive

    def settle(self) -> None:
        """End `expect`."""
        _thread.expecting.pop(self, None)

    def take(self) -> dict[str, Vision]:
        """What was encoded on this thread since the last call, by kind."""
        return _thread.pending.pop(self, {})
