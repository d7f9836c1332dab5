"""What a user waits for, batch by batch: every stage of engines and plans beside its floors, in one run.

    mmefficient bench latency --model reference --plan "fastv(layer=2,keep=0.25)"
    mmefficient bench latency --model llava-1.5-7b --batch 1 --batch 8 --plan "random(keep=64)" --out results

Every engine's tokens are checked before anything is timed (`gate`). `first` is the time to the first token, without
preprocessing; `decode` is per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmefficient.bench import preprocess
from mmefficient.bench.measure import Bench, Row
from mmefficient.bench.presets import PICTURE, prompt, visual_tokens
from mmefficient.bench.result import Target, header
from mmefficient.bench.tables import cell, markdown

STAGES = ("preprocess", "vision", "scoring", "prefill", "first", "decode")


def run(
    target: Target,
    plans: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    *,
    engines: Sequence[str] | None = None,
    repeats: int = 20,
    new_tokens: int = 16,
    picture: tuple[int, int] = PICTURE,
) -> dict[str, Any]:
    """Time the plans; `none` is always one of them and the base of every ratio.

    Args:
        repeats: timed rounds; medians are reported, with the 10th and 90th percentile.
        new_tokens: tokens that every row generates. picture: width and height.

    Returns:
        `header`, "prompt", "preprocess" and "rows"; a row holds milliseconds per stage, FLOPs, bytes and both floors
        per stage, time over the larger floor, the speed against stock `generate`, the realised ratio (see
        `measure.realised`), peak and cache bytes, and what the gate found; or `failed`, and no times.
    """
    chosen = target.engines(engines), target.plans(plans)
    bench = Bench(target.model, *chosen, target.ceilings, repeats, new_tokens, target.processor.tokenizer)
    before = preprocess.measure(target.model, target.processor, [*preprocess.SIZES, picture], repeats)
    rows: list[Row] = []
    for batch in batches:
        inputs = prompt(target.model, target.processor, batch, size=picture)
        rows += bench.rows(inputs)
    for row in rows:
        if "ms" in row:
            row["ms"]["preprocess"] = before[-1]["ms"]["stock" if row["engine"].startswith("hf") else "ours"]
    tokens = {"tokens": inputs["input_ids"].shape[1], "visual": visual_tokens(target.model, inputs)}
    shown = {"prompt": tokens | {"picture": list(picture)}, "new_tokens": new_tokens, "repeats": repeats}
    return {**header("latency", target), **shown, "preprocess": before[:-1], "rows": rows}


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    titles = ["batch", "engine", "plan", "visual tokens", *(f"{stage} ms" for stage in STAGES)]
    titles += ["first / floor", "decode / floor", "first vs hf", "decode vs hf", "realised ratio"]
    lines = []
    for row in result["rows"]:
        start = [row["batch"], row["engine"], f"`{row['plan']}`"]
        if "failed" in row:
            lines.append([*start, f"failed: {row['failed'].splitlines()[0]}", *[""] * (len(titles) - 4)])
            continue
        ms = [cell(row["ms"].get(stage, {}).get("median")) for stage in STAGES]
        over = [cell(row["work"][stage]["over_floor"], 2) for stage in ("first", "decode")]
        speed = [cell(row.get("speedup", {}).get(stage), 2, " ×") for stage in ("first", "decode")]
        kept = "→".join(str(n) for n in dict.fromkeys(row["visual_tokens"]))
        lines.append([*start, kept, *ms, *over, *speed, cell(row["realised_ratio"], 2)])
    rows = []
    for one in result["preprocess"]:
        ms = [cell(one["ms"][way]["median"], 2) for way in ("jpeg", "stock", "ours")]
        rows.append([" × ".join(map(str, one["picture"])), *ms, f"{one['largest_difference']:.4f}"])
    sizes = markdown(["picture", "JPEG ms", "stock processor ms", "ours ms", "largest difference"], rows)
    return f"{markdown(titles, lines, left=3)}\n\n{sizes}"
