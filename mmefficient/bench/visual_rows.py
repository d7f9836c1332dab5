"""What prefill costs when visual rows do less: plans beside the stock model, over growing numbers of visual tokens.

    python -m mmefficient.bench rows --plan composite --plan saisa --images 1 --images 5 --out result.json

A LLaVA-1.5-7B geometry with random weights reads 35 tokens, some pictures of 576 tokens and 64 tokens. Where a plan
projects visual rows anew in every layer, each layer has a projector of its own, as a trained model has. Plans, engines
and attention backends take turns in every repeat; plans are attached before the clock starts, and the stock model
carries none. Before anything is timed, the logits of each plan and engine are compared with those of its simulation,
which computes every row and masks (up to five pictures).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LogitsProcessor

from mmefficient.bench.floors import measure
from mmefficient.bench.presets import random_model
from mmefficient.bench.tables import cell, markdown
from mmefficient.bench.timers import StageTimer
from mmefficient.environment import collect, command
from mmefficient.graph import release
from mmefficient.methods.rows.saisa import PROJECTORS
from mmefficient.plan import Plan
from mmefficient.points import RowPolicy

BEFORE, AFTER = 35, 64
WARM_UP = 2  # the graph engine records on the second
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def geometry(layers: int = 32, width: int = 4096, inner: int = 11008, heads: int = 32) -> Any:
    """Config of a LLaVA-1.5 with CLIP-L at 336 pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=65536,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=576)


def prompt(model: Any, images: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """`batch` rows of random text around `images` random pictures each."""
    config = model.config
    side = config.vision_config.image_size
    visual = images * (side // config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 90, (batch, BEFORE + AFTER), generator=generator)
    middle = torch.full((batch, visual), config.image_token_id)
    ids = torch.cat([text[:, :BEFORE], middle, text[:, BEFORE:]], 1).to(model.device)
    pixels = torch.randn(batch * images, 3, side, side, generator=generator).to(model.device, model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@dataclass(frozen=True)
class Case:
    """What is timed: `engine` "stock" carries no plan, and has an attention `backend` of its own."""

    engine: str
    plan: str = "none"
    backend: str = "default"

    def attached(self, model: Any) -> AbstractContextManager[Any]:
        """Everything in place; gives the run, nothing of use for the stock model."""
        if self.engine != "stock":
            return Plan(self.plan).apply(model, engine=self.engine)  # type: ignore[arg-type]
        return sdpa_kernel(BACKENDS[self.backend]) if self.backend in BACKENDS else nullcontext()


def run(
    plans: Sequence[str],
    images: Sequence[int],
    *,
    engines: Sequence[str] = ("graph",),
    repeats: int = 5,
    batch: int = 1,
    config: Any = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Time prefill; returns plain data with one row per (images, engine, plan or backend).

    Args:
        images: pictures per prompt, one table row each; config: None = the 7B geometry.
        engines: "graph" ("auto" on a CPU) or "eager", each without a plan and with every plan.
    """
    target = torch.device(device)
    model: Any = random_model(config or geometry(), target, dtype)
    if any(isinstance(each, RowPolicy) and each.sources for plan in plans for each in Plan(plan).methods):
        base = model.model
        each = [copy.deepcopy(base.multi_modal_projector) for _ in model.get_decoder().layers]
        setattr(base, PROJECTORS, nn.ModuleList(each))
    ceilings = measure(target, dtype)
    stock = [Case("stock", backend=name) for name in (BACKENDS if target.type == "cuda" else ["default"])]
    ours = [Case(engine, plan) for engine in engines for plan in dict.fromkeys(["none", *plans])]
    rows = []
    for count in images:
        inputs = prompt(model, count, batch)
        gaps = {case: gap(model, inputs, case) for case in ours if case.plan != "none" and count * batch <= 5}
        times: dict[Case, list[float]] = {case: [] for case in [*stock, *ours]}
        flops: dict[str, tuple[int, int]] = {}
        for index in range(repeats + WARM_UP):
            for case in times:
                with case.attached(model) as seen, StageTimer(model) as timer:
                    generate(model, inputs)
                if index >= WARM_UP:
                    times[case].append(timer.stages_ms["prefill"])
                if case.engine != "stock":
                    report = seen.report()
                    flops[case.plan] = report.prefill_flops, report.prefill_flops_without_plan
        full = flops["none"][1]
        base = {engine: statistics.median(times[Case(engine)]) for engine in engines}
        base["stock"] = min(statistics.median(times[case]) for case in stock)
        for case, each in times.items():
            prefill, saved = statistics.median(each), 1 - flops[case.plan][0] / full
            rows.append(
                {
                    "visual": int((inputs["input_ids"] == model.config.image_token_id).sum() // batch),
                    "batch": batch,
                    "engine": case.engine,
                    "plan": case.plan,
                    "backend": case.backend,
                    "prefill_ms": prefill,
                    "all_ms": each,
                    "flops": flops[case.plan][0],
                    "flops_saved": saved,
                    "times_faster": {
                        "the best stock": base["stock"] / prefill,
                        **{one.backend: statistics.median(times[one]) / prefill for one in stock},
                        "its engine": base[case.engine] / prefill,
                    },
                    "realised_ratio": {
                        "the best stock": (1 - prefill / base["stock"]) / saved,
                        "its engine": (1 - prefill / base[case.engine]) / saved,
                    }
                    if saved
                    else None,
                    "gap_to_simulation": gaps.get(case),
                }
            )
    release(model)
    return {
        "benchmark": "rows",
        "command": command(),
        "ceilings": {"flops_per_s": ceilings.flops, "bytes_per_s": ceilings.bandwidth},
        "rows": rows,
        "environment": collect(),
    }


class _Noted(LogitsProcessor):
    """Keeps the logits of the first token."""

    logits: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores.float().clone()
        return scores


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One token; float32 [B, V], its logits."""
    noted = _Noted()
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, logits_processor=[noted])
    assert noted.logits is not None
    return noted.logits


def gap(model: Any, inputs: dict[str, torch.Tensor], case: Case) -> float:
    """Largest distance of the first logits between computing less and masking, over their standard deviation."""
    with Plan(case.plan).apply(model, mode="simulate"):
        masked = generate(model, inputs)
    found = []
    for _ in range(WARM_UP):  # as it is, and recorded
        with case.attached(model):
            found.append(generate(model, inputs))
    return max(float((each - masked).abs().max() / masked.std()) for each in found)


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    titles = ["visual", "batch", "what runs", "prefill ms", "FLOPs saved", "faster than the best stock"]
    titles += ["realised ratio against it", "than its engine without a plan", "realised ratio against that", "gap"]
    lines = []
    for row in result["rows"]:
        plan = "no plan" if row["plan"] == "none" else f"`{row['plan']}`"
        what = f"stock, {row['backend']}" if row["engine"] == "stock" else f"{row['engine']}, {plan}"
        cells = [f"{row['visual']:,}", row["batch"], what, cell(row["prefill_ms"]), f"{row['flops_saved']:.1%}"]
        for base in ("the best stock", "its engine"):
            cells += [cell(row["times_faster"][base], 2), cell((row["realised_ratio"] or {}).get(base), 2)]
        lines.append([*cells, cell(row["gap_to_simulation"], 2)])
    return markdown(titles, lines, left=3)
