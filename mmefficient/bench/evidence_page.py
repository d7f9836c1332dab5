"""The evidence table as Markdown, one part per site, and as two plots: accuracy against time, and against tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmefficient.bench.tables import cell, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_BETTER = "≯ random"
MARK = "does not beat random"
MARKERS = "o^DvP"


def tables(result: Mapping[str, Any]) -> str:
    """One table per site: cost, accuracy per kind with the paired difference to no plan, and the clock."""
    rows, clock = result["rows"], result["clock"]
    main = headline(result)
    kinds = [main, *(kind for kind in result["judged_by"] if kind not in (main, "existence", "caption"))]
    batches = [str(batch) for batch in clock.get("batches", ())]
    titles = ["plan", "tokens, mean over layers", "prefill FLOPs", "of no plan's mean", "− random, same tokens"]
    titles += [f"{kind} %" for kind in kinds]
    captions = list(rows[0].get("captions", ()))
    titles += [f"{name} %" for name in captions]
    titles += [f"{title}, batch {batch}" for batch in batches for title in ("first token ms", "realised ratio")]
    alone = result["settings"]["processes"] == 1  # several share a GPU, and wait for each other
    titles += ["ms/question, embedded model"] * alone
    parts = [_intro(result)]
    for site in dict.fromkeys(row["site"] for row in rows if row["site"] != "none"):
        chosen = [rows[0], *sorted((row for row in rows if row["site"] == site), key=partial(_order, main))]
        lines = [_line(row, kinds, captions, batches, alone) for row in chosen]
        parts += [f"## {site[0].upper()}{site[1:]}", markdown(titles, lines)]
    if result["left_out"]:
        listed = "\n".join(f"- `{plan}`: {why}" for plan, why in result["left_out"].items())
        parts.append(f"## Not in the tables\n\n{listed}")
    return "\n\n".join(parts)


def _intro(result: Mapping[str, Any]) -> str:
    settings, clock = result["settings"], result["clock"]
    parts = [
        f"Accuracy: embedded model, scenes test split, {settings['questions']} questions, {settings['dtype']}, greedy. "
        "In brackets the 95 % interval of the paired difference to no plan, in points (bootstrap over pictures).",
        f"**{NOT_BETTER}**: the plan's mean accuracy {MARK} in the paired interval; random keeps the same number of "
        f"(token, layer) pairs at the language model's input, mean of {result['seeds']} seed(s).",
    ]
    if clock:
        parts.append(
            f"First token: {clock['model']} with random weights, {clock['dtype']}, engine {clock['engine']} (e: eager, "
            f"where it does not run the method), {clock['device']}, median of {clock['repeats']}; methods in the model "
            "at the same depth. A dash: what stays depends on the picture. Realised ratio: time saved to no plan on "
            "the same engine over what the saved prefill FLOPs are worth there; 1 = all of it."
        )
    parts.append(f"Command: `{settings['command']}`, commit {result['environment']['commit']}.")
    return "\n\n".join(parts)


def headline(result: Mapping[str, Any]) -> str:
    """What plans are ordered by: the mean over kinds, or the first kind where too few were asked for one."""
    return next(kind for kind, name in result["judged_by"].items() if name == result["headline"])


def _order(main: str, row: Mapping[str, Any]) -> tuple[float, float]:
    return -(row["keep"] or 0), -row["kinds"][main]["value"]


def _line(
    row: Mapping[str, Any], kinds: Sequence[str], captions: Sequence[str], batches: Sequence[str], alone: bool
) -> list[str]:
    against = row["against_random"].get(kinds[0])
    mark = "" if against is None else _points(against)
    if against is not None and against["verdict"] != "better":
        mark += f" **{NOT_BETTER}**"
    line = [f"`{row['plan']}`", f"{100 * row['share']:.1f} %", f"{100 * row['prefill_flops']:.1f} %"]
    line += [f"{100 * row['kept']:.1f} %", mark]
    for kind in kinds:
        paired = row["paired"].get(kind)
        line.append(f"{100 * row['kinds'][kind]['value']:.1f}" + (f" [{_range(paired)}]" if paired else ""))
    line += [f"{100 * row['captions'][name]['value']:.1f}" for name in captions]
    for batch in batches:
        clock = row["clock"].get(batch)
        mark = " e" if clock and clock["engine"] == "eager" else ""
        line += [cell(clock and clock["first"]["median"]) + mark, cell(clock and clock["realised_ratio"], 2)]
    return line + [cell(sum(row["ms_per_question"].get(stage, 0) for stage in ("vision", "prefill")), 2)] * alone


def _points(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['value']:+.1f} [{_range(entry)}]".replace("-", "−")


def _range(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}".replace("-", "−")


def series(plan: str) -> str:
    """What plans that differ in their budget alone share: names, layers, matchers, positions and what is recycled."""
    found = []
    for method in plan.split("+"):
        name, _, fields = method.partition("(")
        shown = [each for each in ("layer", "recycle", "matcher", "positions") if (name, each) != ("exit", "layer")]
        told = re.findall(rf"\b(?:{'|'.join(shown)})=[^,)]+", fields)
        found.append(f"{name}({','.join(told)})" if told else name)
    return "+".join(found)


def _apart(label: str) -> str:
    return re.sub(r"[(,]positions=\w+", "", label).strip("()")


def figure(result: Mapping[str, Any]) -> Figure:
    """Mean accuracy against time to first token (the largest batch), and against tokens; one line per `series`.

    Times of another engine than the clock's (what it cannot run) are hollow, and lines do not lead there.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, main = result["rows"], headline(result)
    batches = [str(batch) for batch in result["clock"].get("batches", ())]
    own = result["clock"].get("engine")

    def timed(row: Mapping[str, Any]) -> tuple[float | None, Any]:
        cell = row["clock"].get(batches[-1], {})
        return cell.get("first", {}).get("median"), cell.get("engine", own)

    panels = {"visual tokens, mean over layers (%)": lambda row: (100 * row["share"], own)}
    if batches:
        of = f"{result['clock']['model']}, batch {batches[-1]}"
        panels[f"time to first token, {of} (ms; hollow: not on {own})"] = timed
    drawn = Figure(figsize=(6.2 * len(panels), 6.4), layout="constrained")
    axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows[1:]:
        lines.setdefault(series(row["plan"]), []).append(row)
    names = list(dict.fromkeys(label.partition("(")[0] for label in lines))
    colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
    kinds: dict[str, list[str]] = {}  # of one name, wherever their positions are
    for label in lines:
        known = kinds.setdefault(label.partition("(")[0], [])
        known += [kind for kind in [_apart(label)] if kind not in known]
    for axis, (title, cost) in zip(axes, panels.items(), strict=True):
        for label, chosen in lines.items():
            name = label.partition("(")[0]
            points: dict[Any, list[tuple[float, float]]] = {}
            for row in chosen:
                at, engine = cost(row)
                if at is not None:
                    points.setdefault(engine, []).append((at, 100 * row["kinds"][main]["value"]))
            blind = name in ("random", "grid", "pool", "downsample")
            look: dict[str, Any] = {
                "color": "black" if name == "random" else colours[name],
                "ls": ":" if "positions=keep" in label else "-",
                "ms": 4,
            }
            marker = "s" if blind else MARKERS[kinds[name].index(_apart(label)) % len(MARKERS)]
            look |= {"marker": marker, "lw": 2.2 if name == "random" else 1.1}
            for engine, of_engine in points.items():
                face = None if engine == own else "white"
                axis.plot(*zip(*sorted(of_engine), strict=True), label=label, mfc=face, **look)
        axis.axhline(100 * rows[0]["kinds"][main]["value"], color="#888888", lw=0.8, ls="--")
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    ticks = [5, 10, 20, 30, 50, 70, 100]
    axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_ylabel("mean accuracy over kinds (%)")
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    drawn.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 + 2 * len(panels),
        frameon=False,
        fontsize=7,
    )
    return drawn
