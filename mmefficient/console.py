"""What the command line shows, and the plain data behind it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmefficient.bench.timers import shares
from mmefficient.methods import methods
from mmefficient.points import Reducer

if TYPE_CHECKING:
    from mmefficient.report import Report
    from mmefficient.vlm import Answer

TURNS = {
    True: "many turns on one cache: safe, what stays is the same for every question",
    False: "many turns on one cache: not safe, the first question decides what stays (a chat chooses anew)",
}
STAGE_LABELS = {"preprocess": "preprocess", "vision": "vision tower", "prefill": "prefill", "decode": "decode"}


def print_answers(answer: Answer, plain: Answer | None = None) -> None:
    """The answer; if its plan is not empty, also what stayed and where the time went, beside `plain` if given."""
    console = Console(highlight=False, soft_wrap=True)
    if plain is None and answer.report.plan == "none":
        console.print(escape(answer.text))
        return
    shown = [("no plan", plain)] if plain is not None else []
    shown.append((answer.report.plan, answer))
    for name, one in shown:
        console.print(f"[bold]{escape(name)}[/]: {escape(one.text)}")
    console.print()
    for name, one in shown:
        console.print(f"[bold]{escape(name)}[/]: {escape(kept_sentence(one.report))}")
    console.print(_stage_table([(name, one.report.stages_ms) for name, one in shown]))


def kept_sentence(report: Report) -> str:
    """What stayed, by runs of layers: ``576 visual tokens; 576 in layers 0-1, 144 in layers 2-11; ...``."""
    row = report.rows[0]
    runs: list[list[int]] = []  # first layer, last layer, tokens
    for layer, kept in enumerate(row.kept_per_layer):
        if runs and runs[-1][2] == kept:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, kept])
    parts = [f"{n} in layer {first}" if first == last else f"{n} in layers {first}-{last}" for first, last, n in runs]
    share = report.prefill_flops / report.prefill_flops_without_plan
    return f"{row.visual_total} visual tokens; {', '.join(parts)}; {share:.0%} of the prefill FLOPs"


def _stage_table(columns: list[tuple[str, dict[str, float]]]) -> Table:
    table = Table("stage", show_footer=True)
    table.columns[0].footer = "total"
    for name, stages in columns:
        total = sum(stages.values())
        table.add_column(f"{escape(name)}\nms", justify="right", footer=f"{total:.1f}")
        table.add_column("share", justify="right", footer="100%")
    for stage, label in STAGE_LABELS.items():
        cells = [(f"{stages[stage]:.1f}", f"{shares(stages)[stage]:.0%}") for _, stages in columns]
        table.add_row(label, *(cell for pair in cells for cell in pair))
    return table


def describe_methods() -> list[dict[str, Any]]:
    """Name, extension point, summary, paper and fields (name, type, default, help) of every method.

    Of reducers also "many_turns": whether what stays is the same for every question.
    """
    return [
        {
            "name": method.name,
            "point": method.point,
            "summary": method.summary,
            "paper": method.paper,
            "fields": [_describe_field(field) for field in dataclasses.fields(method)],
            **({"many_turns": method.many_turns} if issubclass(method, Reducer) else {}),
        }
        for method in methods()
    ]


def _describe_field(field: dataclasses.Field[Any]) -> dict[str, Any]:
    described = {"name": field.name, "type": str(field.type), "help": field.metadata.get("help", "")}
    return described if field.default is dataclasses.MISSING else {**described, "default": field.default}


def print_methods(found: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for method in found:
        console.print(f"[bold]{method['name']}[/] ({method['point']}): {escape(method['summary'])}")
        for field in method["fields"]:
            default = f" = {field['default']!r}" if "default" in field else ""
            console.print(escape(f"  {field['name']}: {field['type']}{default}  {field['help']}"))
        if "many_turns" in method:
            console.print(f"  {TURNS[method['many_turns']]}")
        console.print(f"  {method['paper']}\n")


def print_environment(facts: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in facts.items():
        if name == "problems":
            continue
        if isinstance(value, dict):
            value = "\n".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = "\n".join(f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['capability']}" for gpu in value)
        table.add_row(name, escape(str(value or "none")))
    console = Console(highlight=False)
    console.print(table)
    for problem in facts["problems"]:
        console.print(f"[bold red]problem[/]: {escape(problem)}")
