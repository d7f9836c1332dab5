"""On a GPU: recorded programs generate what the model generates, and a model that can be recorded says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import mmefficient as mm
from mmefficient.graph import release
from mmefficient.plan import Plan
from tests import tiny
from tests.tiny_checkpoint import processor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PLANS = ["none", "fastv(layer=2,keep=0.5)", "pool(keep=0.3)", "exit(layer=2)", "random(keep=0.5)"]
PLANS += ["pyramiddrop(shares=(0.6,0.4,0.2))", "cdpruner(keep=0.4,matcher=words,positions=keep)"]
TOWER = ["visionzip(dominant=0.4,contextual=0.2)", "fastervlm(keep=0.4)", "vispruner(keep=0.4,important=0.5)"]
TOWER += ["trim(keep=0.4,matcher=words)", "prumerge(keep=0.4)"]
PLANS += ["composite", "no_visual_self(scope=nothing)", "shortv(layers=(1,3))+skip_ffn(layers=(2,))"]
PLANS += ["thin_ffn(ratio=3.0)+window2d(radius=1)", "modality_mutual", "fastv(layer=2,keep=0.5)+shortv(layers=(0,1,3))"]
PLANS += ["block_images+no_visual_self(scope=text,layers=(2,))", "yopo(exit=3,radius=1)"]
TOWER += ["saisa"]
CASES = [(family, plan) for family in tiny.FAMILIES for plan in PLANS + (TOWER if family != "qwen2_5_vl" else [])]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_recorded_ids_are_those_of_eager(family: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny.build(family).cuda()
    prompts = tiny.ragged_prompts(family)
    options = {"max_new_tokens": 6, "do_sample": False}
    for batch in (tiny.collate(family, prompts), tiny.collate(family, prompts[:1])):
        batch = {name: value.cuda() for name, value in batch.items()}
        with Plan(plan).apply(model) as run:
            want = model.generate(**batch, **options)
            report = run.report()
        with Plan(plan).apply(model, engine="auto") as run:
            for _ in range(4):
                assert torch.equal(model.generate(**batch, **options), want)
                assert run.report() == report
    held = run.report().engine
    assert held["name"] == "graph"
    assert held["recordings"] >= 6, caplog.text  # encoder, prompt and step of two batches
    release(model)


@pytest.mark.parametrize("plan", ["none", "fastv(layer=1,keep=0.3)", "fastervlm(keep=0.4)"])
def test_chats_that_keep_their_pictures_answer_the_same(plan: str) -> None:
    """Recordings read what was copied back from the host, and no longer what the encoder left on the device."""
    vlm = mm.VLM(tiny.build("llava_next").cuda(), processor("llava_next"), plan)
    pictures = [Image.linear_gradient("L").resize((40, 24)), Image.radial_gradient("L").resize((20, 50))]
    fresh, kept = (vlm.chat(pictures, retain=retain, max_new_tokens=4) for retain in (None, "cpu"))
    for question in ("what is in the picture?", "how many dogs?", "a cat?", "a dog?") * 2:
        want, found = fresh.ask(question), kept.ask(question)
        assert found.text == want.text
        assert found.report.rows == want.report.rows
        assert torch.equal(found.report.kept(0, 3), want.report.kept(0, 3))
    assert found.report.stages_ms["vision"] == 0
    release(vlm.model)


def test_buffers_grow_under_recordings() -> None:
    """Longer prompts move the buffers, and all recordings are made anew."""
    model: Any = tiny.build("llava").cuda()
    options = {"max_new_tokens": 4, "do_sample": False}
    with Plan().apply(model, engine="graph") as run:
        for length in (5, 150, 9, 400, 5):
            batch = {k: v.cuda() for k, v in tiny.collate("llava", [tiny.prompt("llava", 1, 3, length)]).items()}
            for _ in range(3):
                ids = model.generate(**batch, **options)
            assert run.report().engine["recordings"] >= 2
            with torch.no_grad():
                logits = model(**{**batch, "input_ids": ids[:, :-1], "attention_mask": None}).logits
            assert torch.equal(logits[:, -3:].argmax(-1), ids[:, -3:])
    release(model)


def test_a_capture_that_fails_leaves_no_trace() -> None:
    from mmefficient.graph.capture import Captures, CudaGraphs

    device = torch.device("cuda", torch.cuda.current_device())
    captures = Captures(CudaGraphs(device), device)
    x = torch.arange(4.0, device=device)
    for _ in range(3):
        assert captures.run((("waits",),), lambda given: given["x"] * given["x"].sum().item(), {"x": x})[1] == 6
    for _ in range(3):
        assert captures.run((("runs",),), lambda given: given["x"] + 1, {"x": x})[1] == 2
    assert len(captures) == 1
    torch.multinomial(torch.ones(4, device=device), 1)  # random numbers work outside a capture
    captures.clear()
    for _ in range(2):
        assert captures.run((("runs",),), lambda given: given["x"] + 1, {"x": x})[1] == 2
