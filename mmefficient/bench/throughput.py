"""What one process gets through: images and tokens per second, and memory, by batch size.

    mmefficient bench throughput --model llava-1.5-7b --plan "fastv(layer=2,keep=0.25)" --out results

Rows are those of `latency` (same gate, same rounds); a batch is answered completely before the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmefficient.bench.measure import Bench, Row
from mmefficient.bench.presets import PICTURE, prompt, visual_tokens
from mmefficient.bench.result import Target, header
from mmefficient.bench.tables import cell, markdown

BATCHES = (1, 4, 8, 16, 32)


def run(
    target: Target,
    plans: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    *,
    engines: Sequence[str] | None = None,
    repeats: int = 5,
    new_tokens: int = 16,
    picture: tuple[int, int] = PICTURE,
) -> dict[str, Any]:
    """As `latency.run`; rows also hold images and generated tokens per second, preprocessing not included."""
    bench = Bench(target.model, target.engines(engines), target.plans(plans), target.ceilings, repeats, new_tokens)
    rows: list[Row] = []
    for batch in batches:
        inputs = prompt(target.model, target.processor, batch, size=picture)
        rows += bench.rows(inputs)
    for row in rows:
        if "ms" in row:
            seconds = (row["ms"]["first"]["median"] + row["ms"]["decode"]["median"] * (new_tokens - 1)) / 1e3
            row["images_per_s"], row["tokens_per_s"] = row["batch"] / seconds, row["batch"] * new_tokens / seconds
    tokens = {"tokens": inputs["input_ids"].shape[1], "visual": visual_tokens(target.model, inputs)}
    shown = {"prompt": tokens | {"picture": list(picture)}, "new_tokens": new_tokens, "repeats": repeats}
    return {**header("throughput", target), **shown, "rows": rows}


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    titles = ["batch", "engine", "plan", "images/s", "tokens/s", "first ms", "decode ms", "first / floor",
              "decode / floor", "realised ratio", "peak GiB", "K/V GiB"]  # fmt: skip
    lines = []
    for row in result["rows"]:
        start = [row["batch"], row["engine"], f"`{row['plan']}`"]
        if "failed" in row:
            lines.append([*start, f"failed: {row['failed'].splitlines()[0]}", *[""] * (len(titles) - 4)])
            continue
        over = [cell(row["work"][stage]["over_floor"], 2) for stage in ("first", "decode")]
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        lines.append(
            [*start, cell(row["images_per_s"]), cell(row["tokens_per_s"]),
             *(cell(row["ms"][stage]["median"]) for stage in ("first", "decode")), *over,
             cell(row["realised_ratio"], 2), cell(peak, 2), cell(row["kv_bytes"] / 2**30, 2)]
        )  # fmt: skip
    return markdown(titles, lines, left=3)
