"""What the demo shows of an answer, as small pieces of HTML: no script, no network, readable at any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from mmefficient.bench.timers import STAGES
from mmefficient.console import kept_sentence
from mmefficient.demo.service import Measured
from mmefficient.evaluation.markdown import NOISE, difference, estimate
from mmefficient.profiles.heads import MAPS

COLOURS = {"preprocess": "#8c8c8c", "vision": "#56b4e9", "prefill": "#0072b2", "decode": "#e69f00"}

CSS = """
.mm-bar { display: flex; height: 1.1rem; border-radius: 3px; overflow: hidden; background: #8882; }
.mm-bar span { display: block; height: 100%; }
.mm-key { display: flex; flex-wrap: wrap; gap: 0 0.9rem; font-size: 0.85rem; margin: 0.25rem 0 0.5rem; }
.mm-key i { display: inline-block; width: 0.7rem; height: 0.7rem; margin-right: 0.3rem; border-radius: 2px; }
.mm-layers { display: flex; align-items: flex-end; height: 3rem; gap: 2px; }
.mm-layers span { flex: 1; background: #0072b2; min-height: 2px; }
.mm-facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem; margin: 0.4rem 0; }
.mm-facts dt { font-weight: 600; } .mm-facts dd { margin: 0; }
.mm-wide { overflow-x: auto; } .mm-wide table { border: 0 !important; border-collapse: collapse; }
.mm-wide code { overflow-wrap: anywhere; white-space: normal; } .mm-wide td:first-child { min-width: 10rem; }
.mm-wide td, .mm-wide th { padding: 0.25rem 0.6rem; border: 0 !important; text-align: left; }
.mm-wide tr { border: 0 !important; box-shadow: 0 1px #8884; }
.mm-wide td.n, .mm-wide th.n { text-align: right; font-variant-numeric: tabular-nums; }
.mm-heads { display: inline-block; margin: 0 1.5rem 1rem 0; vertical-align: top; }
.mm-heads div { display: flex; } .mm-heads span { width: 1.1rem; height: 1.1rem; margin: 1px; border-radius: 2px; }
#kept img { width: 100%; object-fit: contain; }
.mm-plot { width: 100%; max-width: 44rem; height: auto; }
@media (max-width: 640px) { .mm-plot text { font-size: 24px; } }
"""


def cost(one: Measured, longest: float) -> str:
    """Stage times as a bar (full width = `longest` ms), visual tokens per layer, and the figures in words."""
    return _stages(one, longest) + _layers(one) + _facts(one)


def _stages(one: Measured, longest: float) -> str:
    parts, keys = [], []
    for stage in STAGES:
        ms = one.stages_ms[stage]
        parts.append(f'<span style="width:{100 * ms / longest:.2f}%;background:{COLOURS[stage]}"></span>')
        keys.append(f'<span><i style="background:{COLOURS[stage]}"></i>{stage} {ms:.1f} ms</span>')
    label = f"{one.total_ms:.0f} ms in all"
    bar = f'<div class="mm-bar" role="img" aria-label="{label}">{"".join(parts)}</div>'
    return f'{bar}<div class="mm-key">{"".join(keys)}</div>'


def _layers(one: Measured) -> str:
    row = one.report.rows[0]
    total = max(1, row.visual_total)
    bars = "".join(
        f'<span style="height:{100 * kept / total:.1f}%" title="layer {layer}: {kept} visual tokens"></span>'
        for layer, kept in enumerate(row.kept_per_layer)
    )
    return f'<div class="mm-layers" role="img" aria-label="visual tokens per layer">{bars}</div>'


def _facts(one: Measured) -> str:
    report = one.report
    facts = {
        "visual tokens": kept_sentence(report),
        "prefill": f"{report.prefill_flops / 1e9:.2f} of {report.prefill_flops_without_plan / 1e9:.2f} GFLOPs",
        "K/V cache": f"{one.kv_bytes / 2**20:.2f} MiB after the prompt",
        "time": f"{one.total_ms:.0f} ms; medians of {one.repeats} warm runs that took turns with the other plan",
    }
    if one.realised is not None:
        facts["realised"] = f"{one.realised:.2f} of the prefill time that the saved FLOPs are worth"
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f'<dl class="mm-facts">{listed}</dl>'


def comparison(found: Sequence[Measured]) -> str:
    """One row per plan."""
    head = "".join(
        f"<th{cls}>{name}</th>"
        for name, cls in (
            ("plan", ""),
            ("answer", ""),
            ("visual tokens, mean over layers", ' class="n"'),
            ("prefill FLOPs", ' class="n"'),
            ("prefill ms", ' class="n"'),
            ("all ms", ' class="n"'),
        )
    )
    rows = []
    for one in found:
        share = one.report.prefill_flops / one.report.prefill_flops_without_plan
        cells = [f"{mean_tokens(one):.0f}", f"{share:.0%}", f"{one.stages_ms['prefill']:.1f}", f"{one.total_ms:.1f}"]
        figures = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td><code>{escape(one.plan)}</code></td><td>{escape(one.text)}</td>{figures}</tr>")
    times = "One warm run" if found[0].repeats == 1 else f"Medians of {found[0].repeats} warm runs"
    note = f"{times} of every plan, taking turns."
    return f'<div class="mm-wide"><table><tr>{head}</tr>{"".join(rows)}</table></div><p>{note}</p>'


def mean_tokens(one: Measured) -> float:
    """Visual tokens a decoder layer holds, mean over layers."""
    kept = one.report.rows[0].kept_per_layer
    return sum(kept) / len(kept)


def scatter(found: Sequence[Measured]) -> str:
    """Prefill time over visual tokens as SVG; a dot is hollow where the answer differs from the first plan's."""
    width, height, left, bottom = 640, 320, 52, 40
    most = max(mean_tokens(one) for one in found) or 1
    slowest = max(one.stages_ms["prefill"] for one in found) or 1
    dots = []
    for one in found:
        x = left + (width - left - 20) * mean_tokens(one) / most
        y = height - bottom - (height - bottom - 20) * one.stages_ms["prefill"] / slowest
        fill = COLOURS["prefill"] if one.text == found[0].text else "none"
        title = escape(f"{one.plan}: {one.text} ({mean_tokens(one):.0f} tokens, {one.stages_ms['prefill']:.1f} ms)")
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{COLOURS["prefill"]}" stroke-width="2">'
            f"<title>{title}</title></circle>"
        )
    middle = 'text-anchor="middle"'
    axes = (
        f'<path d="M{left} 10V{height - bottom}H{width - 10}" fill="none" stroke="currentColor"/>'
        f'<text x="{width / 2}" y="{height - 8}" {middle}>visual tokens, mean over layers (to {most:.0f})</text>'
        f'<text transform="translate(16 {height / 2 - 10}) rotate(-90)" {middle}>prefill ms (to {slowest:.0f})</text>'
    )
    style = 'fill="currentColor" font-size="13"'
    return (
        f'<svg class="mm-plot" viewBox="0 0 {width} {height}" role="img" aria-label="prefill time over visual tokens">'
        f"<g {style}>{axes}</g>{''.join(dots)}</svg>"
        "<p>A dot is a plan (hover for its name); hollow: its answer differs from the one without a plan.</p>"
    )


def accuracies(report: Mapping[str, Any]) -> str:
    """An evaluation report as Markdown: accuracy per kind of question without and with the plan, and the difference."""
    none, plan = report["plans"][0], report["plans"][-1]
    lines = [
        f"| kind | n | `{none['plan']}` | `{plan['plan']}` | difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, value in none["metrics"].items():
        if name.endswith("/accuracy"):
            cells = [estimate(value, None), estimate(plan["metrics"][name], None)]
            paired = difference(plan["paired"][name], None) if plan is not none else ""
            lines.append(f"| {name.removesuffix('/accuracy')} | {value['n']} | {' | '.join(cells)} | {paired} |")
    note = f"In percent, with 95 % bootstrap intervals; {NOISE} marks a difference whose interval includes zero. "
    note += "A handful of questions per kind says little: look at the mean, and ask more."
    return "\n".join(lines) + f"\n\n{note}"


def head_maps(maps: Tensor) -> str:
    """[maps, layers, heads], in the order of `MAPS`, as grids of squares: a row per layer; hovering tells the value."""
    found = []
    for name, values in zip(MAPS, maps.tolist(), strict=True):
        low = min(map(min, values))
        span = (max(map(max, values)) - low) or 1.0
        rows = []
        for layer, row in enumerate(values):
            squares = "".join(
                f'<span style="background:rgb(0 114 178 / {0.08 + 0.92 * (value - low) / span:.2f})" '
                f'title="layer {layer}, head {head}: {value:.3g}"></span>'
                for head, value in enumerate(row)
            )
            rows.append(f"<div>{squares}</div>")
        label = f"{name}, {low:.2g} to {low + span:.2g}"
        found.append(f'<div class="mm-heads" role="img" aria-label="{label}"><p>{label}</p>{"".join(rows)}</div>')
    return "".join(found)
