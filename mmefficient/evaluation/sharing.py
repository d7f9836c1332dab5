"""Encodes a picture once for all questions of a batch that show it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from mmefficient.plan import Plan


class SharedPictures:
    """Inside this context the model's image encoder runs on the distinct pictures of a batch only.

    It stands in for `get_image_features` and repeats the result, so the model, and a plan attached later, see what they
    would have seen. Plans whose methods look into the vision tower need a row per question there and share nothing,
    nor do models whose pictures are not rows of the encoder's inputs.

    Attributes:
        pictures: names of the pictures of the coming batch, one per row; equal names are equal pictures.
        encoded: pictures that the encoder was given for the latest batch.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        self._base = getattr(model, "base_model", model)
        self._active = not any(method.watches for method in plan.methods)
        self.pictures: Sequence[str] = ()
        self.encoded = 0

    def __enter__(self) -> SharedPictures:
        stock = self._base.get_image_features

        @functools.wraps(stock)
        def encode(*args: Any, **kwargs: Any) -> Any:
            self.encoded = len(self.pictures)
            distinct = list(dict.fromkeys(self.pictures))
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            rows = {len(tensor) for tensor in tensors}
            if not self._active or rows != {len(self.pictures)} or len(distinct) == len(self.pictures):
                return stock(*args, **kwargs)
            first = [self.pictures.index(name) for name in distinct]
            back = [distinct.index(name) for name in self.pictures]

            def pick(value: Any) -> Any:
                return value[first] if torch.is_tensor(value) else value

            out = stock(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()})
            self.encoded = len(distinct)
            features = out.pooler_output
            repeated = features[back] if torch.is_tensor(features) else type(features)(features[i] for i in back)
            return type(out)(pooler_output=repeated)

        self._own = self._base.__dict__.get("get_image_features")
        self._base.__dict__["get_image_features"] = encode
        return self

    def __exit__(self, *_: object) -> None:
        del self._base.__dict__["get_image_features"]
        if self._own is not None:
            self._base.__dict__["get_image_features"] = self._own
