"""Programs over fixed buffers: run as they are at first, recorded once they come back, replayed from then on."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mmefficient.errors import ModelError

log = logging.getLogger("mmefficient")

Inputs = Mapping[str, torch.Tensor]
Key = tuple[Hashable, ...]
Body = Callable[[Inputs], Any]
"""A program: the same input shapes lead to the same device work, whatever the values. Returns dicts and lists."""

TARGETS = frozenset({torch.tensor, torch.as_tensor, torch.Tensor.to, torch.Tensor.cuda})


class Constants(TorchFunctionMode):
    """Tensors that a body makes on the device out of host values: kept by one run, given again to the next.

    A capture cannot copy from pageable memory, and the values are the same each time by the definition of a body.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor | None] = []
        self._next: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in TARGETS or (isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu"):
            return func(*args, **kwargs)
        if self._next is not None:
            known = self.kept[self._next]
            self._next += 1
            return func(*args, **kwargs) if known is None else known
        made = func(*args, **kwargs)
        # on the CPU nothing is copied; there, fresh tensors stand for those that would be
        fresh = made.device.type != "cpu" or not isinstance(args[0], torch.Tensor)
        self.kept.append(made if fresh else None)
        return made

    def again(self) -> Constants:
        """The mode for the second run."""
        self._next = 0
        return self


class OneDevice(TorchFunctionMode):
    """Brings host tensors to `device` where they meet tensors that are there, as when a body reads sizes on the host.

    Outside of it `Constants` must be at work, which keeps them: they are the same each time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        met = {each.device.type for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        if len(met) > 1:
            args, kwargs = tree_map(self._brought, (args, kwargs))
        return func(*args, **kwargs)

    def _brought(self, value: Any) -> Any:
        here = not isinstance(value, torch.Tensor) or value.device.type != "cpu"
        return value if here else value.to(self.device)


class Recorder(Protocol):
    """Turns a body into something that can be replayed."""

    def record(self, body: Callable[[], Any]) -> Recording: ...


@dataclass
class Recording:
    """What a recorder made: `replay` fills `outputs` anew; `kept` must live as long; `size` in bytes."""

    replay: Callable[[], None]
    outputs: Any
    kept: Any
    size: int


class CudaGraphs:
    """Records CUDA graphs on one device. All share one memory pool: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._start()

    def _start(self) -> None:
        """Open a memory pool. The pool dies with its last graph, so an empty one stays; and no graph is under way."""
        self.pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), torch.cuda.device(self.device):
            warnings.simplefilter("ignore")  # torch finds an empty graph odd
            self._capture(self._anchor, lambda: None)

    def _capture(self, graph: torch.cuda.CUDAGraph, body: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        # not torch.cuda.graph(), which empties the allocator's cache: somebody else's graphs may look into it
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # other threads may allocate
            try:
                outputs = body()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return outputs

    def record(self, body: Callable[[], Any]) -> Recording:
        constants = Constants()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream), constants:
                body()  # compiles kernels and fills workspaces
            current.wait_stream(self.stream)
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                with constants.again():
                    outputs = self._capture(graph, body)
            except RuntimeError:
                # torch leaves pool and random numbers as if the capture went on; another, well ended, puts them right
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                self._start()
                raise
            size = torch.cuda.memory_reserved() - before
            current.wait_stream(self.stream)
        return Recording(graph.replay, outputs, (graph, constants.kept), max(0, size))


@dataclass
class _Captured:
    inputs: dict[str, torch.Tensor]
    recording: Recording
    taken: dict[str, torch.Tensor] = field(default_factory=dict)


class Captures:
    """Recorded programs by key, the least recently used of which make room for new ones.

    Args:
        recorder: None = never record.
        device: where programs run; limit: recordings kept.

    Attributes:
        strict: raise where a program cannot be recorded, instead of saying so once and running it as it is.
    """

    def __init__(self, recorder: Recorder | None, device: torch.device, limit: int = 48) -> None:
        self.recorder, self.device, self.limit, self.strict = recorder, device, limit, False
        self._found: OrderedDict[Key, _Captured] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._refused: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._found)

    @property
    def size(self) -> int:
        """Bytes that the recordings took when they were made."""
        return sum(one.recording.size + sum(t.nbytes for t in one.inputs.values()) for one in self._found.values())

    def clear(self) -> None:
        """Forget all recordings, because something they refer to has moved."""
        self._found.clear()

    def run(
        self,
        key: Key,
        body: Body,
        inputs: Inputs,
        plain: Callable[[], Any] | None = None,
        lasting: Inputs = MappingProxyType({}),
    ) -> Any:
        """Run `body` on `inputs`; what it returns is borrowed until the next call with this key.

        Args:
            key: whatever the device work depends on, besides the shapes of the inputs. The first entry names the kind
                of program: when one cannot be recorded, no other of its kind is tried.
            inputs: tensors on any device.
            plain: what to do instead of `body(inputs)` while nothing is recorded.
            lasting: further inputs of `body`, which keep their values: the same tensor is not copied again.

        Raises:
            ModelError: `strict`, and the program cannot be recorded.
        """
        given = {**inputs, **lasting}
        kind, key = key[0], _with_shapes(key, given)
        found = self._found.get(key)
        if found is None and self.recorder is not None and self._refused.isdisjoint((kind, key)):
            found = self._record(kind, key, body, given) if self._seen_before(key) else None
        if found is None:
            return body(given) if plain is None else plain()
        self._found.move_to_end(key)
        for name, tensor in given.items():
            if found.taken.get(name) is not tensor:
                found.inputs[name].copy_(tensor, non_blocking=True)
        found.taken = dict(lasting)
        found.recording.replay()
        return found.recording.outputs

    def peek(self, key: Key, inputs: Inputs) -> Any:
        """The outputs of a recorded program, None if it is not recorded."""
        found = self._found.get(_with_shapes(key, inputs))
        return found and found.recording.outputs

    def _seen_before(self, key: Key) -> bool:
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > 16 * self.limit:
            self._seen.popitem(last=False)
        return seen

    def _record(self, kind: Hashable, key: Key, body: Body, inputs: Inputs) -> _Captured | None:
        assert self.recorder is not None
        while len(self._found) >= self.limit:
            self._found.popitem(last=False)
        fixed = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items()}
        try:
            recording = self.recorder.record(lambda: body(fixed))
        except RuntimeError as error:
            self._refused.add(key if isinstance(error, torch.OutOfMemoryError) else kind)
            reason = str(error).splitlines()[0]
            if self.strict:
                raise ModelError(f"this prompt cannot be captured ({reason}); use engine='auto'.") from error
            log.warning("not captured, runs as it is: %s", reason)
            return None
        self._found[key] = _Captured(fixed, recording)
        return self._found[key]


def _with_shapes(key: Key, inputs: Inputs) -> Key:
    return *key, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
