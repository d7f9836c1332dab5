"""Tab "Ask": one question under two plans side by side, and what each of them kept of the picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image
from torch import Tensor

from mmefficient.demo.service import Measured, Service
from mmefficient.demo.speak import spoken
from mmefficient.demo.uploads import picture_input
from mmefficient.demo.views import cost
from mmefficient.draw import attention_at, kept_at

DRAWN = ["kept, left plan", "kept, right plan", "attention received"]


class Shown(NamedTuple):
    """What the last question of a session left behind."""

    picture: Image.Image
    answers: tuple[Measured, Measured]
    attention: Tensor  # [layers, visual tokens]


class Inputs(NamedTuple):
    """Components that several tabs read."""

    model: gr.Dropdown
    picture: gr.Image
    question: gr.Textbox
    plan: gr.Dropdown


def _favourite(presets: list[str]) -> str:
    return next((plan for plan in presets if plan.startswith("fastv")), presets[-1])


def ask_tab(service: Service, samples: list[list[str]]) -> Inputs:
    """Build the tab inside the current `gr.Blocks`."""
    names = list(service.models)
    first = names[0]
    presets = service.presets(first)
    shown = gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            picture = picture_input(label="Picture", height=240, alt_text="the picture to ask about")
            question = gr.Textbox(label="Question", lines=2, placeholder="Is there a dog in the image?")
            model = gr.Dropdown(names, value=first, label="Model", interactive=True, visible=len(names) > 1)
            left = gr.Dropdown(presets, value="none", label="Left plan", allow_custom_value=True)
            right = gr.Dropdown(presets, value=_favourite(presets), label="Right plan", allow_custom_value=True)
            button = gr.Button("Ask", variant="primary", elem_id="ask")
            sample = gr.Dataset(
                components=[picture], samples=[[path] for path, _ in samples], type="index", label="Sample pictures"
            )
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                sides = []
                for side in ("left", "right"):
                    with gr.Column(min_width=280):
                        text = gr.Textbox(label=f"Answer, {side} plan", interactive=False, elem_id=f"answer-{side}")
                        sides.append((text, gr.HTML(elem_id=f"cost-{side}")))
            gr.Markdown("### What is kept")
            with gr.Row():
                which = gr.Radio(DRAWN, value=DRAWN[1], label="What is drawn")
                depth = service.layers(first)
                layer = gr.Slider(0, depth - 1, depth - 1, step=1, label="Decoder layer", elem_id="layer")
            drawn = gr.Image(
                label="Visual tokens of this layer",
                interactive=False,
                height=400,
                elem_id="kept",
                buttons=["fullscreen"],
            )
            words = gr.Markdown(elem_id="kept-words")

    @spoken
    def ask(model: str, picture: Image.Image | None, question: str, left: str, right: str) -> Iterator[Any]:
        """Answer under both plans, streaming; then measure both, warm and taking turns."""
        texts = ["", ""]
        for side, plan in enumerate((left, right)):
            for texts[side] in service.stream(model, picture, question, plan):
                yield *texts, "", "", None
        yield *texts, "measuring …", "measuring …", None
        one, other = service.measure(model, picture, question, [left, right], warm=True)
        longest = max(one.total_ms, other.total_ms)
        assert picture is not None
        attention = service.attention(model, picture, question)
        shown = Shown(picture, (one, other), attention)
        yield one.text, other.text, cost(one, longest), cost(other, longest), shown

    @spoken
    def kept(shown: Shown | None, which: str, layer: int) -> tuple[Image.Image | None, str]:
        """The picture with the visual tokens that a decoder layer holds, or lit by the attention they receive there."""
        if shown is None:
            return None, "Ask a question first; then the slider shows what each layer holds."
        layer = min(int(layer), len(shown.attention) - 1)
        if which == DRAWN[2]:
            received = shown.attention[layer]
            drawn = attention_at(shown.picture, shown.answers[0].report, received)
            return (
                drawn,
                f"No plan, layer {layer}: visual tokens receive {received.sum():.0%} of the last row's attention.",
            )
        report = shown.answers[DRAWN.index(which)].report
        row = report.rows[0]
        gone = next((index for index, count in enumerate(row.kept_per_layer) if not count), None)
        words = f"`{report.plan}`, layer {layer}: {row.kept_per_layer[layer]} of {row.visual_total} visual tokens."
        words += "" if gone is None else f" The picture leaves at layer {gone}."
        return kept_at(shown.picture, report, layer), words

    def pick(index: int) -> list[str]:
        return samples[index]

    @spoken
    def adjust(model: str) -> tuple[Any, Any, Any]:
        plans = service.presets(model)
        depth = service.layers(model)
        return gr.update(choices=plans), gr.update(choices=plans), gr.update(maximum=depth - 1, value=depth - 1)

    outputs = [sides[0][0], sides[1][0], sides[0][1], sides[1][1], shown]
    told = {"concurrency_id": "model", "concurrency_limit": 1}
    drawing = ([shown, which, layer], [drawn, words])
    gr.on([layer.change, which.change], kept, *drawing, api_name="kept", trigger_mode="always_last")
    asked = gr.on(
        [button.click, question.submit], ask, [model, picture, question, left, right], outputs, api_name="ask", **told
    )
    asked.then(kept, *drawing, api_visibility="private")
    sample.click(pick, sample, [picture, question], api_visibility="private")
    model.change(adjust, model, [left, right, layer], api_visibility="private")
    return Inputs(model, picture, question, right)
