"""What happens before the language model: image layouts, and the vision tower facts some methods ask for.

`generate` encodes images before the prefill (transformers >= 5.18) or inside it (5.17, and plain `forward`), on the
thread that runs the prefill. So what is seen here waits in thread-local storage until that prefill takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmefficient.arguments import arguments_of
from mmefficient.attention import KEY
from mmefficient.errors import ModelError
from mmefficient.kernels.key_scores import key_scores
from mmefficient.matchers import OWN, WORDS, Seen, load
from mmefficient.points import LayerTokens, Method, TowerLayer, TowerTokens
from mmefficient.retention import retained
from mmefficient.tokens import Layout
from mmefficient.tower import taken

if TYPE_CHECKING:
    from mmefficient.graph.engine import Engine
    from mmefficient.models.base import Adapter


FEATURES = TowerLayer()
"""The layer whose output the projector reads."""

SEEN = "_mmefficient_seen"
"""Attribute of an encoder's output that holds its `Vision`."""

PICTURES = ("pixel_values", "image_sizes", "image_grid_thw")


@dataclass(frozen=True)
class Tower:
    """Facts per tower patch, flattened over all crops of all images; what nobody asked for is empty.

    Attributes:
        features: input of the projector, [M, Dv].
        layers: attention [M] and keys [M, d] of tower layers.
        matched: by matcher, the patches in its space, [M, E].
        mark: bool [M], see `decisions.VisualTokens`.
    """

    features: torch.Tensor | None = None
    layers: Mapping[TowerLayer, LayerTokens] = field(default_factory=dict)
    matched: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mark: torch.Tensor | None = None

    def __len__(self) -> int:
        known = [self.features, self.mark, *self.matched.values()]
        return next(len(each) for each in known if each is not None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything there is, by name."""
        named = {
            "features": self.features,
            "mark": self.mark,
            **{f"match {name}": x for name, x in self.matched.items()},
        }
        for number, facts in enumerate(self.layers.values()):
            named |= {f"attention {number}": facts.attention, f"keys {number}": facts.keys}
        return {name: x for name, x in named.items() if x is not None}

    def like(self, tensors: Mapping[str, torch.Tensor]) -> Tower:
        """The same facts in other tensors, named as in `tensors`."""
        layers = {
            layer: LayerTokens(tensors[f"attention {number}"], tensors[f"keys {number}"])
            for number, layer in enumerate(self.layers)
        }
        matched = {name: tensors[f"match {name}"] for name in self.matched}
        return Tower(tensors.get("features"), layers, matched, tensors.get("mark"))

    def tokens(self, source: torch.Tensor) -> TowerTokens:
        """Facts of the patches `source` [U, N]; needs features and layers."""
        assert self.features is not None
        at = source.to(self.features.device)
        layers = {
            layer: LayerTokens(*(x[at].to(source.device) for x in (facts.attention, facts.keys)))
            for layer, facts in self.layers.items()
        }
        own = layers[FEATURES]
        return TowerTokens(self.features[at].to(source.device), own.attention, own.keys, layers)


@dataclass(frozen=True)
class Vision:
    """The images (or the videos) of one encoder call.

    Attributes:
        layouts: one per image.
        strides: for each image, the tower patches before it in `tower`.
        tower: None unless asked for.
        given: the pixels of images, and what goes with them.
    """

    layouts: list[Layout]
    strides: list[int]
    tower: Tower | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.pending: WeakKeyDictionary[Watcher, dict[str, Vision]] = WeakKeyDictionary()
        self.expecting: WeakKeyDictionary[Watcher, Callable[[str, Vision], None]] = WeakKeyDictionary()
        self.capture: dict[Any, torch.Tensor] | None = None


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
    """Observes the vision side of one model for the methods of a plan. Holds no state of a call.

    Raises:
        ModelError: the model has no tower that can be asked what they want to know, or a matcher cannot be loaded.
    """

    def __init__(self, adapter: Adapter, methods: Sequence[Method] = ()) -> None:
        self.adapter = adapter
        self.matchers = {
            name: load(name)
            for name in (getattr(r, "matcher", WORDS) for r in methods if "match" in r.needs)
            if name not in OWN
        }
        reading = any("tower" in r.needs for r in methods)
        wanted = {FEATURES, *(layer for r in methods for layer in r.tower_layers)} if reading else set()
        self.attentions: dict[TowerLayer, Any] = {layer: adapter.tower_attention(layer.layer) for layer in wanted}
        self.watching = any(r.watches for r in methods) and bool(
            self.matchers or reading or any("mark" in r.needs for r in methods)
        )
        self.projector = adapter.tower_parts()[0] if reading or self.matchers else None
        self.engine: Engine | None = None

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
        for attention in {id(module): module for module in self.attentions.values()}.values():
            undo += [part.register_forward_hook(self.note).remove for part in (attention.q_proj, attention.k_proj)]
        if self.projector is not None:
            undo.append(self.projector.register_forward_pre_hook(self.on_projector).remove)
        if self.matchers:
            tower = self.adapter.base.vision_tower
            undo.append(tower.register_forward_pre_hook(self.on_tower, with_kwargs=True).remove)
        return undo

    def note(self, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        if _thread.capture is not None:
            _thread.capture[module] = out

    def on_projector(self, module: nn.Module, args: Any) -> None:
        if _thread.capture is not None:
            _thread.capture["features"] = args[0]

    def on_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if _thread.capture is not None:
            _thread.capture["pixels"] = args[0] if args else kwargs["pixel_values"]

    def observe(self, kind: str, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the encoder and note what it was given and gave."""
        watch = kind == "image" and self.watching
        if self.engine is None:
            encode = partial(self.encode, watch, stock, args, kwargs)
        else:
            encode = partial(self.engine.encode, self, kind, watch, stock, args, kwargs)
        held = retained()
        out, tower = encode() if held is None else held.recall(kind, encode, self.adapter.decoder.device)
        features = getattr(out, "pooler_output", None)
        if features is None:  # asked for a tuple: not a call of generate or forward
            return out
        arguments = arguments_of(stock, args, kwargs)
        layouts = self.adapter.layouts(kind, arguments, features)
        for layout, tokens in zip(layouts, features, strict=True):
            if len(layout) != len(tokens):
                raise ModelError(f"expected {len(layout)} tokens of a {kind} but the model made {len(tokens)}.")
        strides = [0] * len(layouts)
        if tower is not None:
            crops = self.adapter.crops(arguments, len(layouts))
            each = len(tower) // sum(crops)
            strides = [each * before for before in accumulate(crops, initial=0)][:-1]
        given = {name: arguments[name] for name in PICTURES if arguments.get(name) is not None}
        vision = Vision(layouts, strides, tower, given if kind == "image" else {})
        _thread.pending.setdefault(self, {})[kind] = vision
        setattr(out, SEEN, vision)  # without a cache `generate` hands the same output to every step
        expecting = _thread.expecting.get(self)
        if expecting is not None:
            expecting(kind, vision)
        return out

    def encode(self, watch: bool, stock: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Tower | None]:
        """Run the encoder; with `watch` also return the facts of the tower."""
        _thread.capture = {} if watch else None
        try:
            out = stock(*args, **kwargs)
            seen = _thread.capture
        finally:
            _thread.capture = None
            mark = taken()
        return out, None if seen is None or not (seen or mark is not None) else self.facts(seen, mark)

    def facts(self, seen: Mapping[Any, torch.Tensor], mark: torch.Tensor | None = None) -> Tower:
        """Turn captured activations, [crops, T, D] each, into facts per patch.

        Raises:
            ModelError: the tower's rows are not its features plus at most one CLS row.
        """
        if "features" not in seen:
            return Tower(mark=mark)
        features = seen["features"]
        layers = {
            layer: self.layer(layer, seen[attention.q_proj], seen[attention.k_proj], attention.num_heads, features)
            for layer, attention in self.attentions.items()
        }
        matched = {}
        if self.matchers:
            mean, std = self.adapter.pixel_statistics()
            what = Seen(self.adapter.base.vision_tower, seen["pixels"], mean, std, features)
            matched = {name: matcher.patches(what).flatten(0, 1) for name, matcher in self.matchers.items()}
        return Tower(features.flatten(0, 1), layers, matched, mark)

    @staticmethod
    def layer(
        layer: TowerLayer, query: torch.Tensor, key: torch.Tensor, heads: int, features: torch.Tensor
    ) -> LayerTokens:
        """Attention [M] and keys [M, d] of one layer; query, key: [crops, T or T + 1, heads * d]."""
        heads = 1 if layer.joined else heads
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        lead = key.shape[2] - features.shape[1]
        if lead not in (0, 1) or key.shape[0] != features.shape[0]:
            raise ModelError("the vision tower's attention rows do not match its features; tower methods cannot run.")
        rows = query[:, :, :1] if lead and layer.rows == "class" else query
        scores = key_scores(rows, key, scale=key.shape[-1] ** -0.5, heads="mean")
        return LayerTokens(scores[:, lead:].flatten(), key.mean(1)[:, lead:].flatten(0, 1))

    def expect(self, receive: Callable[[str, Vision], None]) -> None:
        """Call `receive` for encoder calls on this thread until `settle`."""
        _thread.expecting[self] = receive

    def settle(self) -> None:
        """End `expect`."""
        _thread.expecting.pop(self, None)

    def take(self) -> dict[str, Vision]:
        """What was encoded on this thread since the last call, by kind."""
        return _thread.pending.pop(self, {})
