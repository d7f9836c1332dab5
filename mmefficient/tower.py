"""A vision tower that gives fewer tokens: hooks that shrink what runs in it, and put the results at chosen patches.

Everything after the projector sees as many tokens as ever, of which only the *marked* ones hold anything; a reducer at
the language model's input lets the others leave. So packing, placeholders and positions stay the model's own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mmefficient.errors import ModelError
from mmefficient.points import Unit, resolve_budget

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter


class _Thread(threading.local):
    def __init__(self) -> None:
        self.homes: torch.Tensor | None = None
        self.mark: torch.Tensor | None = None


_thread = _Thread()


def taken() -> torch.Tensor | None:
    """The mark that the latest encoding on this thread left, bool [crops * patches], or None; forgets it."""
    mark, _thread.mark = _thread.mark, None
    return mark


class Thinning:
    """Base of what makes a tower give fewer tokens. Subclasses hook the tower and call `settle` once per encoding."""

    def __init__(self, adapter: Adapter) -> None:
        adapter.tower_layers()  # families without such a tower say so
        self.tower: Any = adapter.base.vision_tower
        self.projector: Any = adapter.base.multi_modal_projector
        config = self.tower.config
        self.side: int = config.image_size // config.patch_size
        self.patch: int = config.patch_size

    def attach(self) -> list[Callable[[], Any]]:
        """Start; returns what undoes it."""
        return [self.projector.register_forward_hook(self.on_projector).remove]

    def settle(self, homes: torch.Tensor) -> None:
        """Say at which patches the tower's tokens are to stand: distinct numbers, int64 [crops, tokens]."""
        _thread.homes = homes

    def on_projector(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        homes, _thread.homes = _thread.homes, None
        if homes is None:
            return None
        if out.ndim != 3 or out.shape[:2] != homes.shape:
            raise ModelError(
                f"the projector made {tuple(out.shape[:2])} tokens where {tuple(homes.shape)} were expected; "
                "towers whose CLS token is kept cannot give fewer tokens."
            )
        patches = self.side**2
        mark = torch.zeros(len(out), patches, dtype=torch.bool, device=out.device).scatter_(1, homes, True)
        _thread.mark = mark.flatten()
        whole = out.new_zeros(len(out), patches, out.shape[2])
        return whole.scatter_(1, homes[..., None].expand_as(out), out)


class SmallerPictures(Thinning):
    """Scales the tower's input down; the tower interpolates its position embeddings.

    Args:
        keep: patches of the smaller picture, a fraction or a count; the grid nearest to it is taken.

    Raises:
        ModelError: the tower takes pictures of one size only.
        BudgetError: more patches than the whole picture has.
    """

    def __init__(self, adapter: Adapter, keep: float | int) -> None:
        try:
            super().__init__(adapter)
            able = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        except ModelError:
            able = False
        if not able:
            name = type(adapter.base).__name__
            raise ModelError(f"the pictures of {name} cannot be scaled here; give its processor smaller pictures.")
        side = self.side
        unit = Unit(0, "a crop", 0, side * side, ((side, side),))
        self.target = max(1, round((resolve_budget(keep, unit)) ** 0.5))
        middle = (2 * torch.arange(self.target) + 1) * side // (2 * self.target)
        self.homes = torch.cartesian_prod(middle * side, middle).sum(-1)[None]

    def attach(self) -> list[Callable[[], Any]]:
        return [*super().attach(), self.tower.register_forward_pre_hook(self.on_tower, with_kwargs=True).remove]

    def on_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        kwargs = dict(kwargs)
        pixels = args[0] if args else kwargs.pop("pixel_values")
        self.settle(self.homes.to(pixels.device).expand(len(pixels), -1))
        if self.target == self.side:
            return None
        edge = self.target * self.patch
        smaller = F.interpolate(pixels.float(), size=(edge, edge), mode="bicubic", antialias=True).to(pixels.dtype)
        return (smaller, *args[1:]), {**kwargs, "interpolate_pos_encoding": True}
