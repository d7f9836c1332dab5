"""The graph engine: prompts are read and answers decoded by recorded programs instead of thousands of launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from torch import nn

from mmefficient.errors import ModelError, PlanError
from mmefficient.graph.capture import CudaGraphs, Recorder
from mmefficient.graph.engine import Engine
from mmefficient.graph.generate import GenerateTap, log
from mmefficient.graph.modules import modules_of
from mmefficient.matchers import OWN

if TYPE_CHECKING:
    from mmefficient.executor import Executor
    from mmefficient.models.base import Adapter

__all__ = ["EngineName", "attach", "engine_of", "named", "release"]

EngineName = Literal["auto", "graph", "eager"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
ROPES = ("default", "linear", "llama3", "yarn")
KNOWN = frozenset({"last_row_attention", "own_row_attention", "tower", "full_grid"})

_engines: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()


def named(engine: str) -> EngineName:
    """The engine of this name.

    Raises:
        PlanError: there is none.
    """
    for name in ENGINES:
        if name == engine:
            return name
    raise PlanError(f"engine={engine!r} is none of {', '.join(map(repr, ENGINES))}.")


def attach(executor: Executor, engine: EngineName) -> list[Callable[[], Any]]:
    """Let `generate` of the executor's model run on its engine; returns the functions that undo it.

    Args:
        engine: "graph": raise where programs cannot be recorded; "auto": say so once and do without; "eager": nothing.

    Raises:
        PlanError: no such engine. ModelError: "graph", and this model or plan cannot be recorded; says why.
    """
    engine = named(engine)
    model: Any = executor.model
    if engine == "eager" or not hasattr(model, "generate"):
        return []
    modules = modules_of(model, executor.adapter.layers)
    reason = _refusal(executor) or modules.refusal()
    if reason is None and engine == "graph" and next(model.parameters()).device.type != "cuda":
        reason = "there are no CUDA graphs on this device"
    if reason is not None:
        if engine == "graph":
            raise ModelError(f"engine='graph' cannot run this model and plan ({reason}); use engine='auto'.")
        executor.run.eager = reason
        log.info("runs without the graph engine: %s", reason)
        return []
    runner = engine_of(model, executor.adapter)
    runner.modules = modules
    own = model.__dict__.get("generate")
    model.__dict__["generate"] = GenerateTap(runner, executor, model.generate, strict=engine == "graph")
    executor.watcher.engine = runner
    executor.run.graph = runner
    return [partial(_restore, model.__dict__, "generate", own)]


def engine_of(model: nn.Module, adapter: Adapter, recorder: Recorder | None = None) -> Engine:
    """The model's engine, made on first use; it lives as long as the model stays on its device, or until `release`.

    Args:
        recorder: for a new engine: what records its programs; None = CUDA graphs on a GPU, nothing elsewhere.
    """
    found, device = _engines.get(model), next(model.parameters()).device
    if found is None or found.captures.device != device:
        if recorder is None and device.type == "cuda":
            recorder = CudaGraphs(device)
        found = _engines[model] = Engine(model, adapter, recorder)
    return found


def release(model: nn.Module) -> None:
    """Give back the recordings and buffers that the model's engine holds; they are made again when needed."""
    engine = _engines.pop(model, None)
    if engine is not None:
        with engine.lock:
            engine.store.release()


def _refusal(executor: Executor) -> str | None:
    """Why the engine cannot run this plan, or a model of these settings."""
    config = executor.adapter.decoder.config
    if executor.run.mode != "apply":
        return "simulating removes no tokens"
    for modulation in {each for found in executor.modulated.values() for each in found}:
        if not modulation.recordable:
            return f"{modulation.name} cannot be recorded"
    if not all(plan.recordable for plan in executor.planned.values()):
        return "the plan treats visual rows as the programs do not"
    if executor.stream is not None:
        return "the plan runs a second stream"
    for method in executor.reducers:
        known = KNOWN | {"match"} if getattr(method, "matcher", None) in OWN else KNOWN
        if method.adaptive or method.weighted or not method.needs <= known:
            return f"{method.name} decides by what the programs do not keep"
    if "flex" in executor.implementation or "paged" in executor.implementation:
        return f"attention implementation {executor.implementation!r}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"rotary embeddings of type {rope!r} depend on the length"
    head: Any = executor.model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:
        return "the head is no linear layer"
    return None


def _restore(place: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        place.pop(name, None)
    else:
        place[name] = value
