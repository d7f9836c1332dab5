"""The report as one self-contained HTML page: plots, verdicts, and the answers that plans lose."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmefficient.evaluation.markdown import cost, describe, difference, estimate
from mmefficient.evaluation.plots import BLIND, colours, plots

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: .2rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
figure { margin: 1rem 0 }
svg, img { max-width: 100%; height: auto }
figcaption, .note { color: #666; font-size: 13px }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
tr { border-bottom: 1px solid #eee }
.blind { color: #777 }
.wide { overflow-x: auto }
.chip { border-radius: 3px; padding: 0 .35em }
.better { background: #d5f0dc }
.equal { background: #fff1cc }
.worse { background: #f9d6d5 }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em }
.lost { display: inline-block; vertical-align: top; margin: 0 1.2rem 1.2rem 0; max-width: 100% }
.lost dl { margin: .2rem 0; font-size: 13px }
.lost dt { color: #666; float: left; clear: left; width: 6em }
.lost dd { margin-left: 6.2em; max-width: 30em }
dl.facts dt { font-weight: 600 }
dl.facts dd { overflow-wrap: anywhere }
"""


def page(report: Mapping[str, Any], pictures: Mapping[tuple[str, str], Path]) -> str:
    """HTML of a report; `pictures` are the files of its regressions by (plan, question id).

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = plots(report)
    plans, headline = report["plans"], report["headline"]
    parts = [
        f"<h1>{escape(report['task'])}</h1>",
        f"<p>{escape(_summary(report))}</p>",
        _overview(report),
        _figure(
            drawn["trade-off"],
            f"{headline} with 95 % intervals against what it costs. Grey: blind baselines at the plans' budgets "
            "(random: all seeds). Only points on the grey line are worth their cost.",
        ),
    ]
    if "rivals" in drawn:
        note = "Paired differences to blind selection at the same budget, with 95 % intervals. Filled: better."
        parts += ["<h2>Does looking help?</h2>", _figure(drawn["rivals"], note)]
    parts += [
        "<h2>By kind of question</h2>",
        _figure(drawn["kinds"], "95 % bootstrap intervals over pictures."),
        "<h2>Where the time goes</h2>",
        _figure(drawn["stages"], "Mean per question; vision: per picture, although questions on one picture share it."),
    ]
    if any(plan["regressions"] for plan in plans):
        parts.append(f"<h2>Answers lost against {escape(plans[0]['plan'])}</h2>")
        parts += [_regressions(plan, pictures) for plan in plans if plan["regressions"]]
    parts += [
        "<h2>All numbers</h2>",
        _numbers(report),
        "<h2>How it was made</h2>",
        _facts(report["settings"]),
        "<h2>Environment</h2>",
        _facts(report["environment"]),
    ]
    title = escape(f"{report['task']}: {', '.join(colours(report))}")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(report: Mapping[str, Any]) -> str:
    """The verdict in one or two sentences."""
    headline = report["headline"]
    judged = [plan for plan in report["plans"] if "random" in plan["against"]]
    text = f"{report['settings']['questions']} questions, judged by {headline}."
    if judged:
        beaten = [plan for plan in judged if plan["against"]["random"][headline]["verdict"] == "better"]
        everything = [p for p in beaten if all(e[headline]["verdict"] == "better" for e in p["against"].values())]
        text += (
            f" {len(beaten)} of {len(judged)} plans beat random selection at their budget, "
            f"{len(everything)} beat every blind baseline."
        )
    return text


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _overview(report: Mapping[str, Any]) -> str:
    headline, tint = report["headline"], colours(report)
    unit = report["settings"]["units"].get(headline)
    names = list(dict.fromkeys(name for plan in report["plans"] for name in plan["against"]))
    header = ["plan", headline, "to no plan", *(f"to {name}" for name in names)]
    header += ["visual tokens", "prefill FLOPs", "ms per question", "flips"]
    rows = []
    for plan in report["plans"]:
        tokens, flops, _, _, flips = cost(plan)
        paired = difference(plan["paired"][headline], unit) if plan["paired"] else ""
        cells = [escape(x) for x in (estimate(plan["metrics"][headline], unit), paired)]
        for name in names:
            entry = plan["against"].get(name, {}).get(headline)
            shown = entry and f'<span class="chip {entry["verdict"]}">{escape(difference(entry, unit))}</span>'
            cells.append(shown or "")
        cells += [escape(x) for x in (tokens, flops, f"{sum(plan['ms_per_question'].values()):.1f}", flips)]
        swatch = f'<span class="swatch" style="background: {tint.get(plan["plan"], BLIND)}"></span>'
        look = ' class="blind"' if plan["role"] == "baseline" else ""
        rows.append((look, [f"{swatch}{escape(plan['plan'])}", *cells]))
    note = (
        "A budget is the mean share of visual tokens over decoder layers; baselines have the plan's. "
        "Green: better than the baseline, yellow: no difference can be told, red: worse (95 % paired bootstrap)."
    )
    left_out = "".join(
        f'<p class="note">{escape(plan)} could not run: {escape(why)}</p>' for plan, why in report["left_out"].items()
    )
    return f'{_table(header, rows)}<p class="note">{note}</p>{left_out}'


def _numbers(report: Mapping[str, Any]) -> str:
    shown = [plan for plan in report["plans"] if plan["role"] != "baseline"]
    units = report["settings"]["units"]
    header = ["metric", "n", *(plan["plan"] for plan in shown)]
    header += [f"lost, gained, p: {plan['plan']}" for plan in shown[1:]]
    rows = []
    for name, entry in shown[0]["metrics"].items():
        tests = [plan["mcnemar"].get(name) for plan in shown[1:]]
        cells = [name, str(entry["n"]), *(estimate(plan["metrics"][name], units.get(name)) for plan in shown)]
        cells += [f"−{test['lost']} +{test['gained']}, {test['p']:.2g}" if test else "" for test in tests]
        rows.append(("", list(map(escape, cells))))
    return f"<details><summary>Every metric, and McNemar's exact test</summary>{_table(header, rows)}</details>"


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Cells of `rows` are HTML, those of the header text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr{look}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for look, cells in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _regressions(plan: Mapping[str, Any], pictures: Mapping[tuple[str, str], Path]) -> str:
    shown = "".join(_regression(lost, pictures[plan["plan"], lost["id"]]) for lost in plan["regressions"])
    return f"<h3>{escape(plan['plan'])}</h3>{shown}"


def _regression(lost: Mapping[str, Any], picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    answers = {
        lost["kind"]: lost["question"],
        "expected": ", ".join(lost["truth"]),
        "no plan": lost["before"],
        "with plan": lost["after"],
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text) or '&nbsp;'}</dd>" for name, text in answers.items())
    alt = f"{lost['id']}: what the plan kept"
    return f'<div class="lost"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"><dl>{listed}</dl></div>'


def _facts(facts: Mapping[str, Any]) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(describe(value))}</dd>" for name, value in facts.items())
    return f'<details><summary>Show</summary><dl class="facts">{listed}</dl></details>'
