"""Does once what the plans of a run have in common: a batch's inputs, and the features of its pictures."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmefficient.plan import Plan

LIMIT = 2**30  # bytes of inputs and features held for the plans to come


@dataclass
class Batch:
    """Questions asked together; what has been made of them once serves every plan that asks them again.

    Attributes:
        pictures: names of the pictures, one per row; equal names are equal pictures.
        inputs: as the processor made them, on the model's device; None until then.
        features: the class of the encoder's output, and its features of the distinct pictures; None until then.
        ms: what making inputs ("preprocess") and features ("vision") took.
    """

    pictures: Sequence[str]
    inputs: Any = None
    features: Any = None
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        features = () if self.features is None else self.features[1]
        tensors = [features] if torch.is_tensor(features) else list(features)
        return sum(tensor.nbytes for tensor in (*tensors, *self.inputs.values()) if torch.is_tensor(tensor))

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are tensors of the inputs, not others made of them."""
        places = {tensor.data_ptr() for tensor in self.inputs.values() if torch.is_tensor(tensor)}
        return all(tensor.data_ptr() in places for tensor in tensors)


class Batches:
    """Batches by the ids of their questions, held until there are `limit` bytes of them; then further ones are not.

    Plans run one after the other, so whatever made room for a new batch would be the next one asked for.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._left = limit
        self._held: dict[tuple[str, ...], tuple[Batch, int]] = {}

    def get(self, ids: Sequence[str], pictures: Sequence[str]) -> Batch:
        held = self._held.get(tuple(ids))
        return held[0] if held else Batch(pictures)

    def keep(self, ids: Sequence[str], batch: Batch) -> None:
        """Holds a batch that has been asked, if there is room; one that is held may have grown."""
        size, before = batch.nbytes, self._held.get(tuple(ids), (batch, 0))[1]
        if before or size <= self._left:
            self._held[tuple(ids)] = batch, size
            self._left -= size - before


class SharedPictures:
    """Inside this context the model's image encoder runs on the distinct pictures of a batch only, and once for it.

    It stands in for `get_image_features` and repeats the result, so the model, and a plan attached later, see what they
    would have seen. Plans whose methods look into the vision tower need a row per question there and share nothing,
    nor do models whose pictures are not rows of the encoder's inputs; other pixels than the batch's own, as a method
    may make of them, are encoded each time.

    Attributes:
        batch: the coming batch, whose inputs are there; its features are used, or filled in.
        encoded: pictures that the encoder was given for the batch, now or when it was asked first.
        saved: ms by stage that the batch would have taken beyond what it took.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        self._base = getattr(model, "base_model", model)
        self._active = not any(method.watches for method in plan.methods)
        self.batch = Batch(())
        self.encoded = 0
        self.saved: dict[str, float] = {}

    def coming(self, batch: Batch) -> None:
        """Says which batch is asked next."""
        self.batch, self.encoded = batch, 0
        self.saved = {} if batch.inputs is None else {"preprocess": batch.ms["preprocess"]}

    def __enter__(self) -> SharedPictures:
        stock = self._base.get_image_features

        @functools.wraps(stock)
        def encode(*args: Any, **kwargs: Any) -> Any:
            batch, count = self.batch, len(self.batch.pictures)
            distinct = list(dict.fromkeys(batch.pictures))
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            if not self._active or {len(tensor) for tensor in tensors} != {count}:
                self.encoded = count
                return stock(*args, **kwargs)
            self.encoded = len(distinct)
            own = batch.holds(tensors)
            if own and batch.features is not None:
                kind, features = batch.features
                self.saved["vision"] = batch.ms["vision"]
            else:
                first = [batch.pictures.index(name) for name in distinct]

                def pick(value: Any) -> Any:
                    return value[first] if torch.is_tensor(value) and len(distinct) < count else value

                began = _clock(tensors)
                out = stock(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()})
                kind, features = type(out), out.pooler_output
                if own:
                    batch.features, batch.ms["vision"] = (kind, features), _clock(tensors) - began
            if len(distinct) < count:
                back = [distinct.index(name) for name in batch.pictures]
                features = features[back] if torch.is_tensor(features) else type(features)(features[i] for i in back)
            return kind(pooler_output=features)

        self._own = self._base.__dict__.get("get_image_features")
        self._base.__dict__["get_image_features"] = encode
        return self

    def __exit__(self, *_: object) -> None:
        del self._base.__dict__["get_image_features"]
        if self._own is not None:
            self._base.__dict__["get_image_features"] = self._own


def _clock(tensors: Sequence[torch.Tensor]) -> float:
    """Milliseconds, once the devices of the tensors have done what was asked of them."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3
