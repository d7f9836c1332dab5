"""Tab "Plan": put methods together from their fields, and take the plan away as code or as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from mmefficient.demo.ask import Inputs
from mmefficient.demo.service import Service, add_method, explain, policy, read_policy, snippets
from mmefficient.demo.speak import spoken
from mmefficient.errors import InputError
from mmefficient.methods import method, methods

MAX_POLICY = 64 * 1024  # bytes


def plan_tab(service: Service, inputs: Inputs, folder: Path) -> None:
    """Build the tab inside the current `gr.Blocks`; policy files are written to `folder`."""
    names = [each.name for each in methods()]
    with gr.Row():
        with gr.Column(min_width=300):
            name = gr.Dropdown(names, value="fastv" if "fastv" in names else names[0], label="Method")
            fields = gr.Column()
        with gr.Column(min_width=300):
            plan = gr.Textbox(label="Plan", value="none", elem_id="plan")
            verdict = gr.Markdown("This is the empty plan.", elem_id="verdict")
            use = gr.Button("Use as the right plan")
            shown: dict[str, Any] = {"interactive": False, "wrap_lines": True}
            python = gr.Code(label="Python", language="python", lines=4, max_lines=8, **shown)
            line = gr.Code(label="Command line", language="shell", lines=2, max_lines=4, **shown)
            saved = gr.DownloadButton("Save the policy file")
            loaded = gr.File(label="Load a policy file", file_types=[".json"], type="filepath", height=120)

    with fields:

        @gr.render(name)
        def form(name: str) -> None:
            kind = method(name)
            gr.Markdown(f"**{kind.name}** ({kind.point}): {kind.summary}. [Paper]({kind.paper})")
            given = [_field(each, kind) for each in dataclasses.fields(kind)]
            labels = [each.name for each in dataclasses.fields(kind)]
            add = gr.Button("Add to the plan", variant="primary", elem_id="add")

            @spoken
            def added(text: str, *values: Any) -> str:
                typed = {
                    label: "" if value is None else str(value) for label, value in zip(labels, values, strict=True)
                }
                return add_method(text, name, typed)

            add.click(added, [plan, *given], plan, api_visibility="private")

    @spoken
    def check(text: str, model: str) -> tuple[str, str, str, str | None]:
        """Whether the plan can be used, as a sentence; and the plan as code, command line and policy file."""
        problem = explain(text, service.model(model))
        if problem:
            return f"**Not possible:** {problem}", "", "", None
        data = policy(text)
        file = folder / f"plan-{hashlib.sha256(data.encode()).hexdigest()[:12]}.json"
        file.write_text(data)
        return "This plan can be used.", *snippets(text, model), str(file)

    @spoken
    def load(file: str | None) -> str:
        """The plan in a policy file."""
        if file is None:
            return "none"
        data = Path(file).read_bytes()
        if len(data) > MAX_POLICY:
            raise InputError(f"A policy file has at most {MAX_POLICY // 1024} KiB.")
        return read_policy(data)

    plan.change(check, [plan, inputs.model], [verdict, python, line, saved], api_name="check_plan")
    loaded.upload(load, loaded, plan, api_name="load_policy")
    use.click(lambda text: text, plan, inputs.plan, api_visibility="private")


def _field(field: dataclasses.Field[Any], kind: type[Any]) -> gr.components.Component:
    """The input for one field of a method, by its type; empty means the default."""
    hint = typing.get_type_hints(kind)[field.name]
    required = field.default is dataclasses.MISSING
    told = {"label": field.name, "info": field.metadata.get("help", ""), "interactive": True}
    value: Any = None if required else field.default
    if typing.get_origin(hint) is Literal:
        return gr.Dropdown(list(typing.get_args(hint)), value=value, **told)
    if hint is bool:
        return gr.Checkbox(value=bool(value), **told)
    if hint is int:
        return gr.Number(value=value, precision=0, **told)
    return gr.Textbox(value="" if value is None else str(value), **told)
