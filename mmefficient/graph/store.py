"""Where keys and values live: one buffer per layer, whose rows have the same address however many are in use."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Store:
    """Keys and values of all layers, token after token, so that a layer that keeps fewer of them needs less.

    Args:
        layers: decoder layers; heads: key heads; size: of one head.
        moved: called when a buffer had to grow, and recorded programs point to where it was.
    """

    def __init__(
        self, layers: int, heads: int, size: int, dtype: torch.dtype, device: torch.device, moved: Callable[[], None]
    ) -> None:
        self.heads, self.size, self.moved = heads, size, moved
        self._buffers = [torch.empty(2, 0, heads, size, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fit(self, dtype: torch.dtype) -> None:
        """Hold keys and values of `dtype`; what is held in another one is lost."""
        if self._buffers[0].dtype != dtype:
            self.release()
            self._buffers = [buffer.to(dtype) for buffer in self._buffers]

    def reserve(self, layer: int, batch: int, tokens: int) -> None:
        """Make room for `tokens` tokens of `batch` rows; what the layer held is lost if it grows."""
        held = self._buffers[layer]
        if batch * tokens > held.shape[1]:
            # the old buffer is freed first: two of them may not fit
            self._buffers[layer] = held.new_empty(2, 0, self.heads, self.size)
            del held
            room = -(-batch * tokens // 256) * 256
            # zeros: masked softmax weights are 0, and 0 times whatever lay in fresh memory may be no number
            self._buffers[layer] = self._buffers[layer].new_zeros(2, room, self.heads, self.size)
            self.moved()

    def rows(self, layer: int, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [batch, heads, tokens, size] each: views of the first `tokens` of `batch` rows."""
        used = self._buffers[layer][:, : batch * tokens].view(2, tokens, batch, self.heads, self.size)
        keys, values = used.permute(0, 2, 3, 1, 4)
        return keys, values

    def release(self) -> None:
        """Give the memory back."""
        self._buffers = [buffer.new_empty(2, 0, self.heads, self.size) for buffer in self._buffers]
        self.moved()
