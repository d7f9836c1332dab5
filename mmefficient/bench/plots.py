"""Plots of benchmark results. matplotlib is imported when the first one is drawn.

Every function takes a result and returns a matplotlib figure.

Raises (all of them):
    ImportError: matplotlib is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"hf": "#8c8c8c", "hf-static": "#c49a3c", "eager": "#3b76af", "graph": "#2e8b57", "auto": "#2e8b57"}


def latency(result: dict[str, Any]) -> Figure:
    """Time to first token and per decoded token of every row, with the floor as a black mark."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in result["rows"] if "ms" in row]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['batch']} · {row['engine']} · {row['plan']}" for row in rows]
    for axis, stage, title in zip(axes, ("first", "decode"), ("time to first token", "per decoded token"), strict=True):
        for place, row in enumerate(rows):
            ms, work = row["ms"][stage], row["work"][stage]
            low, high = max(0.0, ms["median"] - ms["p10"]), max(0.0, ms["p90"] - ms["median"])
            error = {"xerr": [[low], [high]], "error_kw": {"lw": 0.8, "ecolor": "#444444"}}
            axis.barh(place, ms["median"], 0.7, color=COLOURS.get(row["engine"], "#777777"), **error)
            floor = max(work["flops_floor_ms"], work["bytes_floor_ms"])
            axis.plot([floor, floor], [place - 0.42, place + 0.42], color="black", lw=2)
            axis.annotate(f"{ms['median']:.3g}", (ms["median"] + high, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axis.set_title(f"{title}, ms", fontsize=10)
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    axes[0].invert_yaxis()
    mark = Line2D([], [], color="black", lw=2, label="floor of the hardware")
    axes[1].legend(handles=[mark], frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(_title(result, "batch · engine · plan"), fontsize=10)
    return figure


def throughput(result: dict[str, Any]) -> Figure:
    """Images per second and peak memory by batch size, one line per engine and plan."""
    figure, axes = _panels(2)
    for name, rows, style in _lines(result["rows"]):
        batch = [row["batch"] for row in rows]
        axes[0].plot(batch, [row["images_per_s"] for row in rows], label=name, **style)
        values = [(row["peak_bytes"] or row["kv_bytes"]) / 2**30 for row in rows]
        axes[1].plot(batch, values, label=name, **style)
    peak = any(row.get("peak_bytes") for row in result["rows"])
    for axis, title in zip(axes, ("images per second", f"{'peak memory' if peak else 'K/V cache'}, GiB"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("batch")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(_title(result, f"{result['new_tokens']} tokens per answer"), fontsize=10)
    return figure


def scaling(result: dict[str, Any]) -> Figure:
    """Measured prefill times over positions, the fitted curves, and the floor of the plan-free prompt; log-log."""
    figure, axes = _panels(len(batches := sorted({row["batch"] for row in result["rows"]})))
    fits = {(one["engine"], one["plan"]): one for one in result["fits"]}
    for axis, batch in zip(axes, batches, strict=True):
        here = [row for row in result["rows"] if row["batch"] == batch]
        for name, rows, style in _lines(here):
            n = [row["positions"] for row in rows]
            axis.plot(n, [row["ms"]["median"] for row in rows], label=name, **{**style, "ls": ""})
            one = fits.get((rows[0]["engine"], rows[0]["plan"]))
            if one is not None:
                curve = [one["a_ms"] + one["b_ms"] * batch * x + one["c_ms"] * batch * x * x for x in n]
                axis.plot(n, curve, color=style["color"], ls=style["ls"], lw=1)
        floor = {row["positions"]: max(row["flops_floor_ms"], row["bytes_floor_ms"]) for row in here
                 if row["plan"] == "none" and "ms" in row}  # fmt: skip
        axis.plot(list(floor), list(floor.values()), color="black", lw=2, label="floor, no plan")
        axis.set(xscale="log", yscale="log", xlabel="positions per row")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter("")
        axis.set_title(f"prefill, ms, batch {batch}", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(_title(result, "points measured, lines fitted"), fontsize=10)
    return figure


def load(result: dict[str, Any]) -> Figure:
    """Percentiles of the answering time by plan, and memory over the run."""
    figure, axes = _panels(2)
    rows = result["rows"]
    for offset, (name, label) in enumerate((("median", "p50"), ("p90", "p90"), ("p99", "p99"))):
        places = [place + 0.25 * (offset - 1) for place in range(len(rows))]
        axes[0].barh(
            places,
            [row["ms"][name] for row in rows],
            0.24,
            label=label,
            color=("#9dbbd6", "#5f93c0", "#2b5a87")[offset],
        )
    axes[0].set_yticks(range(len(rows)), [row["plan"] for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_title("time to answer, ms", fontsize=10)
    share = [100 * index / (len(result["memory"]) - 1) for index in range(len(result["memory"]))]
    for name, colour in (("host", "#3b76af"), ("device", "#2e8b57")):
        values = [one[name] / 2**20 for one in result["memory"]]
        if any(values):
            axes[1].plot(share, values, color=colour, marker=".", label=name)
    axes[1].set_title("memory, MiB", fontsize=10)
    axes[1].set_xlabel("% of the requests")
    axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in result["outcomes"].items())
    figure.suptitle(_title(result, f"{result['concurrency']} at a time; {outcomes}"), fontsize=10)
    return figure


def _panels(count: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4.4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Label, timed rows and style of every engine and plan: engines differ in colour, plans in the line."""
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    for engine, plan in dict.fromkeys((row["engine"], row["plan"]) for row in rows):
        mine = [row for row in rows if (row["engine"], row["plan"]) == (engine, plan) and "ms" in row]
        place = plans.index(plan)
        style = {"color": COLOURS.get(engine, "#777777"), "ls": ("-", "--", ":", "-.")[place % 4],
                 "marker": "os^Dv"[place % 5], "ms": 4}  # fmt: skip
        if mine:
            yield f"{engine} {plan}", mine, style


def _title(result: dict[str, Any], rest: str) -> str:
    facts = result["environment"]
    machine = facts["gpus"][0]["name"] if result["device"].startswith("cuda") else facts["cpu"]["model"]
    return f"{result['benchmark']}: {result['model']}, {result['dtype']}, {machine}; {rest}"
