"""What a question costs when its picture was read before, beside reading the whole prompt.

    python -m mmefficient.bench reuse --plan composite --plan saisa --images 1 --images 5 --out result.json

The geometry and prompts of `bench rows`: a LLaVA-1.5-7B with random weights, 35 tokens, some pictures of 576 tokens,
64 tokens. Timed is `generate` up to the first token, vision tower left out: of whole prompts on the stock model (SDPA
pinned to FlashAttention and to cuDNN), and of questions alone, whose prompt begins with keys and values that are kept
(`reuse.Encoded`). Before anything is timed, the logits of both ways are compared under every plan.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from mmefficient.bench.presets import random_model
from mmefficient.bench.timers import StageTimer
from mmefficient.bench.visual_rows import BACKENDS, geometry, prompt
from mmefficient.environment import collect, command
from mmefficient.plan import Plan
from mmefficient.reuse import Encoded, encode

MARK = SimpleNamespace(image_token="<image>")
WARM = 2


def kept(model: Any, inputs: dict[str, torch.Tensor], plan: str) -> Encoded:
    """The picture of the first row of `inputs`, read under `plan`."""
    pixels = inputs["pixel_values"][: len(inputs["pixel_values"]) // len(inputs["input_ids"])]
    one = {name: x[:1] for name, x in inputs.items()} | {"pixel_values": pixels}
    return encode(model, MARK, one, MARK.image_token, Plan(plan), None)


def question(inputs: dict[str, torch.Tensor], picture: Encoded) -> dict[str, Any]:
    """The arguments of `generate` that ask the questions of `inputs` about `picture`."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": picture.rows(len(ids))}


@torch.no_grad()
def difference(model: Any, inputs: dict[str, torch.Tensor], plan: str) -> float:
    """Largest distance of the last logits between asking with and without the kept picture, over their deviation."""
    picture, found = kept(model, inputs, plan), []
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with Plan(plan).apply(model):
        for given in (inputs, question(inputs, picture)):
            out = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
            found.append(out.logits[0].float())
    return float((found[0] - found[1]).abs().max() / found[0].std())


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
    """Time questions; returns plain data with one row per (images, plan or backend).

    Args:
        batch: questions in a batch about one prompt's pictures; images: pictures per prompt, one table row each.
    """
    target = torch.device(device)
    model: Any = random_model(config or geometry(), target, dtype)
    stock = list(BACKENDS) if target.type == "cuda" else ["default"]
    rows = []
    for count in images:
        inputs = prompt(model, count)
        inputs = {name: torch.cat([x] * batch) for name, x in inputs.items()}
        gaps = {plan: difference(model, inputs, plan) for plan in plans}
        pictures = {plan: kept(model, inputs, plan) for plan in plans}
        times: dict[tuple[str, str], list[float]] = {("none", name): [] for name in stock}
        times |= {(plan, "reused"): [] for plan in plans}
        for index in range(repeats + WARM):
            for plan, way in times:
                picture = pictures[plan] if way == "reused" else None
                choice = sdpa_kernel(BACKENDS[way]) if way in BACKENDS else nullcontext()
                attached: Any = nullcontext() if picture is None else Plan(plan).apply(model)
                given = inputs if picture is None else question(inputs, picture)
                with choice, attached, StageTimer(model) as timer:
                    model.generate(**given, max_new_tokens=1, do_sample=False, pad_token_id=0)
                if index >= WARM:
                    times[plan, way].append(timer.stages_ms["prefill"])
        base = min(statistics.median(times["none", name]) for name in stock)
        for (plan, way), found in times.items():
            taken = statistics.median(found)
            rows.append(
                {
                    "visual": int((inputs["input_ids"][0] == model.config.image_token_id).sum()),
                    "questions": batch,
                    "plan": plan,
                    "way": way,
                    "ms": taken,
                    "ms_per_question": taken / batch,
                    "all_ms": found,
                    "times_faster": base / taken,
                    "gap": gaps[plan] if way == "reused" else None,
                }
            )
    return {"benchmark": "reuse", "command": command(), "rows": rows, "environment": collect()}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| visual | questions | plan | ms to the first token | ms per question | faster than whole prompts | gap |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        name = f"`{row['plan']}`, picture kept" if row["way"] == "reused" else f"stock, {row['way']}"
        gap = "" if row["gap"] is None else f"{row['gap']:.3f}"
        lines.append(
            f"| {row['visual']:,} | {row['questions']} | {name} | {row['ms']:.1f} | {row['ms_per_question']:.2f} "
            f"| {row['times_faster']:.2f} | {gap} |"
        )
    return "\n".join(lines)
