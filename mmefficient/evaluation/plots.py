"""Plots of an evaluation report, as SVG text. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#5e3c99")
NONE, BLIND = "#222222", "#8a8f98"
MARKERS = {"random": "D", "grid": "s", "pool": "^"}
STAGES = {"preprocess": "#d9d9d9", "vision": "#9ecae1", "prefill": "#3182bd", "decode": "#fdae6b"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "svg.hashsalt": "mmefficient",
}
Entry = Mapping[str, Any]


def plots(report: Entry) -> dict[str, str]:
    """SVG elements by name: "trade-off", "kinds", "rivals" (if there are any) and "stages".

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {"trade-off": _trade_off(report), "kinds": _kinds(report), "stages": _stages(report)}
        if any(plan["against"] for plan in report["plans"]):
            drawn["rivals"] = _rivals(report)
        return {name: _svg(figure) for name, figure in drawn.items()}


def colours(report: Entry) -> dict[str, str]:
    """Of no plan and the tested plans."""
    tested = [plan["plan"] for plan in report["plans"] if plan["role"] == "tested"]
    return {report["plans"][0]["plan"]: NONE} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(tested)}


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Those of (cost, value) that no other beats in both, by rising cost; `lower`: small values are good."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (value < front[-1][1] if lower else value > front[-1][1]):
            front.append((cost, value))
    return front


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _scale(report: Entry, metric: str) -> float:
    return 1.0 if metric in report["settings"]["units"] else 100.0


def _label(report: Entry, metric: str) -> str:
    return f"{metric} ({report['settings']['units'].get(metric, '%')})"


def _bars(entry: Entry, scale: float) -> tuple[float, list[list[float]]]:
    """The value and matplotlib's error bars; an interval need not hold the value itself."""
    value, low, high = (scale * entry[key] for key in ("value", "low", "high"))
    return value, [[max(0.0, value - low)], [max(0.0, high - value)]]


def _total(plan: Entry) -> float:
    return sum(plan["ms_per_question"].values())


def _trade_off(report: Entry) -> Any:
    """Headline metric over time, visual tokens and FLOPs, with the Pareto front of all plans."""
    metric, colour = report["headline"], colours(report)
    plans = [plan for plan in report["plans"] if plan["metrics"][metric]["value"] is not None]
    tokens = report["plans"][0]["visual_tokens_without_plan"] or 1
    costs = {
        "time per question (ms)": _total,
        "visual tokens, mean over layers (%)": lambda plan: 100 * plan["visual_tokens"] / tokens,
        "prefill FLOPs (%)": lambda plan: 100 * (plan["prefill_flops_ratio"] or 0),
    }
    figure = _figure(11, 4.2)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (label, cost) in zip(axes, costs.items(), strict=True):
        points = []
        for plan in plans:
            value, error = _bars(plan["metrics"][metric], _scale(report, metric))
            points.append((cost(plan), value))
            blind = plan["role"] == "baseline"
            name = plan["plan"].partition("(")[0] if blind else plan["plan"]
            look: dict[str, Any] = {"color": colour.get(name, BLIND), "marker": MARKERS[name] if blind else "o"}
            if plan["role"] == "none":
                look |= {"marker": "*", "ms": 11}
            bars = None if blind else error
            axis.errorbar(*points[-1], yerr=bars, label=name, ls="", capsize=2, zorder=2 if blind else 3, **look)
        front = pareto(points, metric in report["lower_is_better"])
        axis.step(*zip(*front, strict=True), where="post", color="#bbbbbb", lw=1.2, zorder=1, label="Pareto front")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(_label(report, metric))
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _kinds(report: Entry) -> Any:
    """One panel per kind and group: bars with intervals, and a tick where random selection at the same budget is."""
    colour = colours(report)
    found = {plan["plan"]: plan for plan in report["plans"]}
    shown = [found[name] for name in colour]
    metrics = list(report["judged_by"].values())
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = _figure(11, lines * (0.55 + 0.19 * len(shown)) + 0.8)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        scale = _scale(report, metric)
        for row, plan in enumerate(shown):
            if plan["metrics"][metric]["value"] is None:
                continue
            value, error = _bars(plan["metrics"][metric], scale)
            axis.barh(row, value, color=colour[plan["plan"]], height=0.75, alpha=0.85)
            axis.errorbar(value, row, xerr=error, color="black", lw=0.9, capsize=1.5)
            random = [found[name]["metrics"][metric]["value"] for name in plan["rivals"].get("random", ())]
            if random and None not in random:
                axis.plot([scale * sum(random) / len(random)] * 2, [row - 0.45, row + 0.45], color="#d00000", lw=1.8)
        axis.set_title(metric + (" (lower is better)" if metric in report["lower_is_better"] else ""), loc="left")
        axis.set_yticks([])
        axis.invert_yaxis()
        if scale == 100:
            axis.set_xlim(0, 100)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour[name], label=name) for name in colour]
    if any("random" in plan["rivals"] for plan in shown):
        handles.append(Line2D([], [], color="#d00000", lw=1.8, label="random at the same budget"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _rivals(report: Entry) -> Any:
    """Differences of the headline metric to the blind baselines at the same budget."""
    metric, colour = report["headline"], colours(report)
    rows = [
        (plan, name, plan["against"][name][metric])
        for plan in report["plans"]
        for name in plan["against"]
        if plan["against"][name][metric]["value"] is not None
    ]
    figure = _figure(8, 0.28 * len(rows) + 1.0)
    axis = figure.subplots()
    for row, (plan, name, entry) in enumerate(rows):
        value, error = _bars(entry, _scale(report, metric))
        good = entry["verdict"] == "better"
        look = {"mfc": colour[plan["plan"]] if good else "white", "color": colour[plan["plan"]]}
        axis.errorbar(value, row, xerr=error, marker=MARKERS[name], capsize=2, **look)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [f"{plan['plan']}  −  {name}" for plan, name, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel(f"difference in {_label(report, metric)}; hollow: not better")
    return figure


def _stages(report: Entry) -> Any:
    """Time per question by stage, one bar per plan; of the random baselines the first seed."""
    plans = [plan for plan in report["plans"] if plan["role"] != "baseline" or "seed=" not in plan["plan"]]
    figure = _figure(9, 0.27 * len(plans) + 1.1)
    axis = figure.subplots()
    for row, plan in enumerate(plans):
        left = 0.0
        for stage, colour in STAGES.items():
            width = plan["ms_per_question"].get(stage, 0.0)
            axis.barh(row, width, left=left, color=colour, height=0.7, label=None if row else stage)
            left += width
    axis.set_yticks(range(len(plans)), [plan["plan"] for plan in plans])
    axis.invert_yaxis()
    axis.set_xlabel("ms per question")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
