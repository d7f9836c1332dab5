"""Tabs "Compare", "Heads" and "Evaluate": all presets on one question, every head on it, a plan on some scenes."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
from PIL import Image

from mmefficient.demo.ask import Inputs
from mmefficient.demo.service import Service, served
from mmefficient.demo.speak import spoken
from mmefficient.demo.views import accuracies, comparison, head_maps, scatter
from mmefficient.evaluation import run_eval

MIN_QUESTIONS, MAX_QUESTIONS = 22, 220
PLAIN, TRACKED = gr.Progress(), gr.Progress(track_tqdm=True)  # Gradio finds them as defaults


def compare_tab(service: Service, inputs: Inputs) -> None:
    """Build the tab inside the current `gr.Blocks`."""
    gr.Markdown("The picture and question of the first tab, under every method with its defaults.")
    button = gr.Button("Compare all presets", variant="primary", elem_id="compare")
    table = gr.HTML(elem_id="comparison")
    plot = gr.HTML()

    @spoken
    def compare(
        model: str, picture: Image.Image | None, question: str, progress: gr.Progress = PLAIN
    ) -> tuple[str, str]:
        """Answer, visual tokens, FLOPs and measured times under every preset."""
        progress(0, desc="asking under every preset")
        found = service.measure(model, picture, question, service.presets(model), repeats=1)
        return comparison(found), scatter(found)

    button.click(
        compare,
        [inputs.model, inputs.picture, inputs.question],
        [table, plot],
        api_name="compare",
        concurrency_id="model",
        concurrency_limit=1,
    )


def heads_tab(service: Service, inputs: Inputs) -> None:
    """Build the tab inside the current `gr.Blocks`."""
    gr.Markdown(
        "What every head does with the picture of the first tab, without a plan: *divergence*, how much its output in "
        "the last prompt row depends on the picture; *image mass*, the attention it gives it; *gain*, what `vhr` would "
        "do. A row is a layer; hover for the value."
    )
    button = gr.Button("Measure the heads", variant="primary", elem_id="heads")
    maps = gr.HTML(elem_id="head-maps")

    @spoken
    def heads(model: str, picture: Image.Image | None, question: str) -> str:
        """Layer x head maps of divergence, image mass and gain."""
        return head_maps(service.heads(model, picture, question))

    button.click(
        heads,
        [inputs.model, inputs.picture, inputs.question],
        maps,
        api_name="heads",
        concurrency_id="model",
        concurrency_limit=1,
    )


def evaluate_tab(service: Service, inputs: Inputs) -> None:
    """Build the tab inside the current `gr.Blocks`."""
    gr.Markdown("A plan against no plan on the first questions of every kind of the embedded test split.")
    plan = gr.Textbox(label="Plan to evaluate", value="fastv(layer=2,keep=0.25)")
    count = gr.Slider(MIN_QUESTIONS, MAX_QUESTIONS, 44, step=22, label="Questions")
    button = gr.Button("Evaluate", variant="primary", elem_id="evaluate")
    table = gr.Markdown(elem_id="evaluation")

    @spoken
    def evaluate(model: str, plan: str, count: int, progress: gr.Progress = TRACKED) -> Iterator[str]:
        """Accuracy per kind of question with 95 % intervals, without the plan and with it."""
        yield "Evaluating …"
        limit = max(1, min(int(count), MAX_QUESTIONS))
        report = run_eval("scenes", [served(plan)], service.model(model), limit=limit, baselines=False, progress=True)
        yield accuracies(report)

    button.click(
        evaluate,
        [inputs.model, plan, count],
        table,
        api_name="evaluate",
        concurrency_id="model",
        concurrency_limit=1,
    )
