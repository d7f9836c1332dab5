"""Train the reference model further under a plan: ``python -m mmefficient.models.reference.train --plan composite``.

Only low-rank updates of the decoder's matrices (and SAISA's projectors) are trained, on the same questions as the model
itself. Visual rows are computed and masked as in a plan's simulation; the plan that computes less uses the result.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaProcessor

from mmefficient.errors import PlanError
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.points import LayerMethod
from mmefficient.rows import LayerPlan

from . import adapt, path
from .data import Batches
from .planned import PlannedObjective
from .record import LOG_EVERY, note, scored, stream
from .scenes.render import load_atlas
from .scenes.splits import KINDS

RANK = 20
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def layer_plans(plan: Plan, model: Any) -> dict[int, LayerPlan]:
    """What `plan` comes to in each decoder layer.

    Raises:
        PlanError: it holds methods that training does not know, such as reducers.
    """
    methods = [method for method in plan.methods if isinstance(method, LayerMethod)]
    if len(methods) < len(plan.methods):
        raise PlanError(f"{plan} removes tokens; only patterns and row policies can be trained here.")
    adapter = adapter_for(model)
    found = {index: LayerPlan.of(methods, index, adapter) for index in range(len(adapter.layers))}
    return {index: each for index, each in found.items() if each is not None}


def run(
    plan: Plan,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    decay: float,
    minutes: float,
    seed: int,
    workers: int,
    device: str,
    compile_model: bool,
    single: bool = False,
) -> None:
    """Train for `steps` steps, or until `minutes` have passed, of which the last `decay` share lowers the rate.

    The minutes count from the end of the first step, which compiles. A delta in `out` is where training starts from.

    Args:
        single: one question per picture, as plans whose visual rows see the question need in any case.
    """
    torch.manual_seed(seed)
    target = torch.device(device)
    processor = LlavaProcessor.from_pretrained(path())
    model: Any = AutoModelForImageTextToText.from_pretrained(path(), dtype=torch.float32).to(target)
    projectors = any(getattr(method, "sources", False) for method in plan.methods)
    trained = adapt.attach(model, 4 if projectors else RANK, ATTENTION if projectors else adapt.ALL, projectors)
    if (out / adapt.WEIGHTS).is_file():
        adapt.resume(model, out)
    single = single or not plan.reusable
    data = Batches(processor, batch_size, seed + 2_000_003, single=single)
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    objective = PlannedObjective(model, processor, data, load_atlas(str(target)), dtype, layer_plans(plan, model))
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    if compile_model:  # layer by layer: equal ones share what is compiled
        for layer in objective.layers:
            layer.compile()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    clock = 0.0
    sums: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(stream(data, 0, steps, workers, target)):
        # the clock may end a run early, and then it also decides how far the rate has fallen
        passed = max((step + 1) / steps, clock)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 1.0, max(0.0, 1 - passed) / decay)
        losses = objective.answer_loss(batch)
        losses["answer"].backward()
        losses["gradient"] = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if not step:
            began = time.monotonic()
        clock = (time.monotonic() - began) / (60 * minutes)
        last = clock >= 1 or step + 1 == steps
        if last or (step + 1) % LOG_EVERY == 0:
            count = (step + 1) % LOG_EVERY or LOG_EVERY
            _log(out, str(plan), step + 1, count, sums, time.monotonic() - began)
            sums = {}
        if last:
            break
    seen = (step + 1) * batch_size
    facts = {"steps": step + 1, "pictures": seen, "single": single, "seconds": round(time.monotonic() - began)}
    adapt.save(model, out, plan=str(plan), **facts)


def _log(out: Path, plan: str, step: int, count: int, sums: dict[str, torch.Tensor], seconds: float) -> None:
    record: dict[str, Any] = {"plan": plan, "step": step, "seconds": round(seconds, 1)}
    record |= {name: round(float(value) / count, 4) for name, value in sums.items() if value.ndim == 0}
    note(out, record | {"exact": scored(sums, KINDS)})
