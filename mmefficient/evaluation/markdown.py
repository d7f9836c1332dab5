"""The report as a page to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOISE = "~"  # marks a difference whose interval includes zero


def markdown(report: Mapping[str, Any]) -> str:
    """Tables of costs, metrics and paired differences (shares in percent), then how to repeat the run."""
    plans = report["plans"]
    units = report["settings"]["units"]
    names = list(plans[0]["metrics"])
    header = ["metric", *(f"`{plan['plan']}`" for plan in plans)]
    parts = [
        f"# {report['task']}",
        _table(
            ["plan", "visual tokens", "prefill FLOPs", "seconds", "questions/s", "flips"],
            [[f"`{plan['plan']}`", *cost(plan)] for plan in plans],
        ),
        "Visual tokens: mean over questions and decoder layers. Prefill FLOPs: relative to no plan. Seconds: stage "
        "times added up over questions and processes, with a vision tower pass for every question although questions "
        "on one picture share it. Questions/s: of one process by the clock, where a picture is encoded once for all "
        "plans that do not look into the tower. Flips: answers that changed when a question was asked alone instead of "
        "in a batch.",
        *_verdicts(report),
        "## Metrics",
        _table(
            [*header[:1], "n", *header[1:]],
            [
                [name, str(plans[0]["metrics"][name]["n"])]
                + [estimate(plan["metrics"][name], units.get(name)) for plan in plans]
                for name in names
            ],
        ),
        "In percent unless the row names a unit, with 95 % bootstrap intervals over pictures.",
    ]
    if len(plans) > 1:
        parts += [
            f"## Differences to `{plans[0]['plan']}`",
            _table(
                [header[0], *header[2:]],
                [[name, *(difference(plan["paired"][name], units.get(name)) for plan in plans[1:])] for name in names],
            ),
            f"Paired, in percentage points unless the row names a unit; {NOISE} marks an interval that includes zero.",
        ]
    parts += ["## How it was made", _facts(report["settings"]), "## Environment", _facts(report["environment"])]
    return "\n\n".join(parts) + "\n"


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    """Whether the plans beat blind baselines at their budget, and how many answers they changed."""
    tested = [plan for plan in report["plans"] if plan["role"] == "tested"]
    names = list(dict.fromkeys(name for plan in tested for name in plan["against"]))
    kinds, headline = report["judged_by"], report["headline"]
    unit = report["settings"]["units"].get(headline)
    parts = []
    if names:
        rows = [
            [f"`{plan['plan']}`", f"{100 * plan['budget']:.1f} %", *(_rivalry(plan, n, headline, unit) for n in names)]
            for plan in tested
        ]
        seeds = max(len(plan["rivals"].get("random", ())) for plan in tested)
        parts += [
            f"## Against blind baselines: {headline}",
            _table(["plan", "budget", *(f"− {name}" for name in names)], rows),
            "Baselines keep the plan's mean share of visual tokens over decoder layers (its budget), chosen blindly at "
            f"the language model's input; `random` is the mean of {seeds} seed(s). Paired differences; **not better** "
            "marks an interval that does not lie on the good side of zero. A dash: the plan is that baseline, or has "
            "no budget to match.",
        ]
    if report["left_out"]:
        parts.append(_facts({f"`{plan}` could not run": why for plan, why in report["left_out"].items()}))
    rows = [
        [metric, *(_changes(plan["mcnemar"][metric]) for plan in tested)]
        for metric in kinds.values()
        if tested and metric in tested[0]["mcnemar"]
    ]
    if rows:
        parts += [
            "## Answers lost and gained",
            _table(["metric", *(f"`{plan['plan']}`" for plan in tested)], rows),
            f"Against `{report['plans'][0]['plan']}`, with the p of McNemar's exact test.",
        ]
    return parts


def _rivalry(plan: Mapping[str, Any], name: str, metric: str, unit: str | None) -> str:
    entry = plan["against"].get(name, {}).get(metric)
    if entry is None:
        return "–"
    text = _interval(entry, unit, lambda x: f"{x:+.1f}".replace("-", "−"))
    return text if entry["verdict"] == "better" else f"{text} **not better**"


def _changes(test: Mapping[str, Any]) -> str:
    return f"−{test['lost']} +{test['gained']}, p {test['p']:.2g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost(plan: Mapping[str, Any]) -> list[str]:
    """Visual tokens, FLOPs, seconds in all stages, questions per second by the clock and flips of a plan."""
    flips, ratio, pace = plan["flips"], plan["prefill_flops_ratio"], plan["questions_per_s"]
    return [
        f"{plan['visual_tokens']:.1f} of {plan['visual_tokens_without_plan']:.1f}",
        "–" if ratio is None else f"{100 * ratio:.1f} %",
        f"{plan['seconds']:.1f}",
        "–" if pace is None else f"{pace:.1f}",
        f"{flips['flipped']} of {flips['checked']}" if flips["checked"] else "not checked",
    ]


def estimate(entry: Mapping[str, Any], unit: str | None) -> str:
    """A metric's value with its interval."""
    return _interval(entry, unit, lambda x: f"{x:.1f}")


def difference(entry: Mapping[str, Any], unit: str | None) -> str:
    """A paired difference with its interval, marked if that includes zero."""
    text = _interval(entry, unit, lambda x: f"{x:+.1f}".replace("-", "−"))
    return text if entry["low"] is None or not entry["low"] <= 0 <= entry["high"] else f"{text} {NOISE}"


def _interval(entry: Mapping[str, Any], unit: str | None, form: Callable[[float], str]) -> str:
    if entry["value"] is None or entry["low"] is None:
        return "–"
    value, low, high = (form(entry[key] * (1 if unit else 100)) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]{f' {unit}' if unit else ''}"


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {describe(value)}" for name, value in facts.items())


def describe(value: Any) -> str:
    """A setting or a fact about the environment in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {describe(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(map(describe, value)) or "none"
    return "none" if value is None else str(value)
