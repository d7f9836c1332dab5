"""What one model needs to run as programs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmefficient.bench.timers import Timed
from mmefficient.graph.block import Rope
from mmefficient.graph.capture import Captures, Inputs, OneDevice, Recorder
from mmefficient.graph.modules import modules_of
from mmefficient.graph.store import Store
from mmefficient.graph.tower import lean_tower

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter
    from mmefficient.vision import Tower, Watcher

CPU = torch.device("cpu")
STEP = 256  # tokens by which the room of a decoding program grows


class Engine:
    """Buffers, recordings, and a lock, since all calls on a model share them.

    Args:
        recorder: None = run the programs as they are.

    Attributes:
        head, embed: the first and the last module around the decoder; busy: a call of `generate` is running;
            searched: the config in which `generate` has found no settings of its own.
    """

    def __init__(self, model: Any, adapter: Adapter, recorder: Recorder | None) -> None:
        self.adapter = adapter
        self.head: Any = model.get_output_embeddings()
        self.embed: Any = model.get_input_embeddings()
        self.lock = threading.RLock()
        self.busy = False
        self.searched: dict[str, Any] | None = None
        attention: Any = adapter.layers[0].self_attn
        weight, size = attention.k_proj.weight, attention.head_dim
        self.captures = Captures(recorder, weight.device)
        shape = (len(adapter.layers), len(weight) // size, size)
        self.store = Store(*shape, weight.dtype, weight.device, self.captures.clear)
        self._written_by = attention.k_proj
        self.modules, self.weights = modules_of(model, adapter.layers), list[int]()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has no engine yet."""

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.embed.weight.device

    def held(self) -> dict[str, int]:
        """Recordings there are, and the bytes of them and of the key and value buffers."""
        return {
            "recordings": len(self.captures),
            "recorded_bytes": self.captures.size,
            "cache_bytes": self.store.nbytes,
        }

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Queue the block's work beside what the current stream does from here on; `join` waits for it."""
        stream = getattr(self.captures.recorder, "stream", None)
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what was queued aside."""
        stream = getattr(self.captures.recorder, "stream", None)
        if stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def check(self) -> None:
        """Forget recordings if weights have moved since, and buffers if they have another precision."""
        self.store.fit(self._written_by.weight.dtype)
        now = self.modules.addresses()
        if now != self.weights:
            self.captures.clear()
            self.weights = now

    def room(self, tokens: int) -> int:
        """Places to provide for `tokens`; few sizes, if programs are recorded for each."""
        return tokens if self.captures.recorder is None else -(-tokens // STEP) * STEP

    def rotary(self, hidden: torch.Tensor, position: torch.Tensor) -> Rope:
        """Cosine and sine of positions [P, B, N]."""
        cos, sin = self.adapter.decoder.rotary_emb(hidden, position if self.adapter.mrope else position[0])
        return cos, sin

    def encode(
        self, watcher: Watcher, kind: str, watch: bool, stock: Any, args: Any, kwargs: Any
    ) -> tuple[Any, Tower | None]:
        """What `watcher.encode` returns, from a recording where there is one."""
        if not self.busy or args:
            return watcher.encode(watch, stock, args, kwargs)
        if isinstance(stock, Timed):  # a recording cannot hold a clock
            with stock.stage():
                return self.encode(watcher, kind, watch, stock.__wrapped__, args, kwargs)  # type: ignore[attr-defined]
        # whole numbers, such as image sizes, decide what is computed: they are read on the host and part of the key
        given = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        fixed = {name: _moved(x, CPU) for name, x in kwargs.items() if name not in given}
        wanted = (*watcher.attentions, *watcher.matchers) if watch else None
        key = (("encode", kind, wanted), tuple((name, _plain(x)) for name, x in fixed.items()))

        def body(inputs: Inputs) -> dict[str, Any]:
            with lean_tower(watcher, kwargs):
                out, tower = watcher.encode(watch, stock, (), {**kwargs, **inputs})
            tensors = None if tower is None else tower.tensors()  # the recorder does not look into a tower
            return {"features": list(out.pooler_output), "tower": tower, "tensors": tensors}

        def plain() -> dict[str, Any]:
            return body({name: _moved(x, self.device) for name, x in fixed.items()})

        def recorded(inputs: Inputs) -> dict[str, Any]:
            with OneDevice(self.device):
                return body({**fixed, **inputs})

        out = self.captures.run(key, recorded, given, plain)
        return BaseModelOutputWithPooling(pooler_output=out["features"]), out["tower"]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _plain(value: Any) -> Any:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value)
