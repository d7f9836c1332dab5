"""What the engine asks about a model's modules before every call, without walking them again."""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import is_not
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmefficient.graph.block import refusal, replaced

_found: WeakKeyDictionary[nn.Module, Modules] = WeakKeyDictionary()


def modules_of(model: nn.Module, layers: nn.ModuleList) -> Modules:
    """The modules of a model, of which `layers` are its decoder's; walked anew if one was exchanged or has moved."""
    found = _found.get(model)
    if found is None or not found.same():
        found = _found[model] = Modules(model, layers)
    return found


class Modules:
    """The modules of a model as they were found. Walking those of 7B takes milliseconds, comparing lists a tenth.

    Attributes:
        reason: why programs cannot stand in for these modules; None if they can.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        # not the model itself, whose engine would keep it alive; the others stay, so that no id is given again
        self._inside = [module for module in model.modules() if module is not model]
        self._decoder = [(module, vars(module)) for layer in layers for module in layer.modules()]
        self._children = [model._modules, *(module._modules for module in self._inside)]
        self._parameters = [model._parameters, *(module._parameters for module in self._inside)]
        self._known = self._identities(), self.addresses()
        self.reason = next(filter(None, map(refusal, layers)), None)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type not in ("cuda", "cpu"):
            self.reason = "the model is not on one CUDA device or the CPU"

    def _identities(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._children))))

    def addresses(self) -> list[int]:
        """Where the weights are."""
        held = chain.from_iterable(map(dict.values, self._parameters))
        return list(map(torch.Tensor.data_ptr, filter(partial(is_not, None), held)))  # type: ignore[arg-type]

    def same(self) -> bool:
        """Whether they still are the model's, and their weights where they were."""
        return (self._identities(), self.addresses()) == self._known

    def refusal(self) -> str | None:
        """Why programs cannot stand in for these modules as they are now."""
        own = [module for module, place in self._decoder if "forward" in place]
        if self.reason is None and any(map(replaced, own)):
            return "a forward was replaced inside the decoder"
        return self.reason
