"""What prefill costs when visual rows do less: plans beside the stock model, over growing numbers of visual tokens.

    python -m mmefficient.bench rows --plan composite --plan saisa --images 1 --images 5 --out result.json

A LLaVA-1.5-7B geometry with random weights reads 35 tokens, some pictures of 576 tokens and 64 tokens. Plans and
attention backends take turns in every repeat; plans are attached before the clock starts, and the stock model carries
none. Before anything is timed, each plan's logits are compared with those of its simulation, which computes every row
and masks (up to five pictures).
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmefficient.bench.floors import measure
from mmefficient.bench.presets import random_model
from mmefficient.bench.timers import StageTimer
from mmefficient.environment import collect
from mmefficient.plan import Plan

BEFORE, AFTER = 35, 64
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


def run(
    plans: Sequence[str],
    images: Sequence[int],
    *,
    repeats: int = 5,
    batch: int = 1,
    config: Any = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Time prefill; returns plain data with one row per (images, plan or backend).

    Args:
        images: pictures per prompt, one table row each; config: None = the 7B geometry.
    """
    target = torch.device(device)
    model: Any = random_model(config or geometry(), target, dtype)
    ceilings = measure(target, dtype)
    stock = [("none", name) for name in BACKENDS] if target.type == "cuda" else [("none", "default")]
    cases = [*stock, *((plan, "default") for plan in plans)]
    rows = []
    for count in images:
        inputs = prompt(model, count, batch)
        gaps = {plan: difference(model, inputs, plan) for plan in plans} if count * batch <= 5 else {}
        times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        flops: dict[str, tuple[int, int]] = {}
        for index in range(repeats + 2):
            for plan, backend in cases:
                choice = sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext()
                attached: Any = nullcontext() if plan == "none" else Plan(plan).apply(model)
                with choice, attached as seen, StageTimer(model) as timer:
                    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
                if index >= 2:
                    times[plan, backend].append(timer.stages_ms["prefill"])
                if seen is not None:
                    report = seen.report()
                    flops[plan] = report.prefill_flops, report.prefill_flops_without_plan
                    flops["none"] = (report.prefill_flops_without_plan,) * 2
        base = min(statistics.median(times[case]) for case in stock)
        for plan, backend in cases:
            prefill, (needed, full) = statistics.median(times[plan, backend]), flops[plan]
            saved = 1 - needed / full
            rows.append(
                {
                    "visual": count * 576 if config is None else int((inputs["input_ids"] == 32000).sum() // batch),
                    "batch": batch,
                    "plan": plan,
                    "backend": backend,
                    "prefill_ms": prefill,
                    "all_ms": times[plan, backend],
                    "flops": needed,
                    "flops_saved": saved,
                    "times_faster": base / prefill,
                    "realised_ratio": (1 - prefill / base) / saved if saved else None,
                    "gap_to_simulation": gaps.get(plan),
                }
            )
    return {
        "benchmark": "rows",
        "command": shlex.join(sys.argv),
        "ceilings": {"flops_per_s": ceilings.flops, "bytes_per_s": ceilings.bandwidth},
        "rows": rows,
        "environment": collect(),
    }


@torch.no_grad()
def difference(model: Any, inputs: dict[str, torch.Tensor], plan: str) -> float:
    """Largest distance of the last logits between computing less and masking, over their standard deviation."""
    found = []
    for mode in ("apply", "simulate"):
        with Plan(plan).apply(model, mode=mode):
            found.append(model(**inputs, logits_to_keep=1, use_cache=False).logits.float())
    return float((found[0] - found[1]).abs().max() / found[1].std())


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| visual | batch | plan | prefill ms | FLOPs saved | faster than the best stock | realised ratio | gap |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        name = f"`{row['plan']}`" if row["plan"] != "none" else f"stock, {row['backend']}"
        ratio, gap = (f"{v:.2f}" if v is not None else "" for v in (row["realised_ratio"], row["gap_to_simulation"]))
        lines.append(
            f"| {row['visual']:,} | {row['batch']} | {name} | {row['prefill_ms']:.1f} | {row['flops_saved']:.1%} "
            f"| {row['times_faster']:.2f} | {ratio} | {gap} |"
        )
    return "\n".join(lines)
