"""Conversations whose visual tokens stay on the host: the same answers and choices, without the vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

import mmefficient as mm
from mmefficient.console import describe_methods
from mmefficient.errors import InputError
from mmefficient.methods import methods
from mmefficient.points import Reducer
from mmefficient.profiles import Checkpoint
from tests.tiny import FAMILIES, GATES, HEAD, build
from tests.tiny_checkpoint import processor

WIDE = Image.linear_gradient("L").resize((40, 24))
TALL = Image.radial_gradient("L").resize((20, 50))
QUESTIONS = ("what is in the picture?", "how many dogs are there?", "a cat?")
ASKING = {"last_row_attention", "own_row_attention", "question_attention", "question", "match"}


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> mm.VLM:
    return mm.VLM(build(request.param), processor(request.param))


@contextmanager
def counted(vlm: mm.VLM) -> Iterator[list[int]]:
    """One entry for every run of the vision tower."""
    seen: list[int] = []
    base = vlm.model.base_model
    tower = getattr(base, "vision_tower", None) or base.visual
    handle = tower.register_forward_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def plans(vlm: mm.VLM) -> list[str]:
    merged = "Qwen" in type(vlm.model).__name__  # no tower facts, and positions that cannot close up
    before = [] if merged else ["fastervlm(keep=0.5)", "trim(keep=0.5,matcher=embeddings)", "tome(keep=0.5)"]
    return ["none", "fastv(layer=1,keep=0.3)", "cdpruner(keep=0.3,matcher=words,positions=keep)", *before]


def test_later_turns_answer_and_choose_as_if_encoded_again(vlm: mm.VLM) -> None:
    for plan in plans(vlm):
        fresh = vlm.chat([WIDE, TALL], plan=plan, max_new_tokens=3)
        kept = vlm.chat([WIDE, TALL], plan=plan, retain="cpu", max_new_tokens=3)
        choices = []
        for turn, question in enumerate(QUESTIONS):
            wanted = fresh.ask(question)
            with counted(vlm) as runs:
                found = kept.ask(question)
            assert bool(runs) == (turn == 0)
            assert found.text == wanted.text
            assert found.report.rows == wanted.report.rows
            choices.append(found.report.kept(0, 3).tolist())
            assert choices[-1] == wanted.report.kept(0, 3).tolist()
            assert (found.report.stages_ms["vision"] == 0) == (turn > 0)
        if plan.startswith("fastv"):  # what the first question dropped is there for the next
            assert any(set(later) - set(choices[0]) for later in choices[1:])


def test_a_new_picture_or_another_plan_encodes_anew(vlm: mm.VLM) -> None:
    chat = vlm.chat(WIDE, retain="cpu", max_new_tokens=2)
    assert chat.retained is not None
    with counted(vlm) as runs:
        chat.ask(QUESTIONS[0])
        one, before = len(runs), chat.retained.nbytes
        chat.ask(QUESTIONS[1], image=TALL)
        assert len(runs) > one
        assert chat.retained.nbytes != before  # OneVision reads several pictures in fewer tokens each
        chat.ask(QUESTIONS[2])
        again = len(runs)
        with pytest.raises(InputError):
            chat.ask("<image> and now?")
        chat.ask(QUESTIONS[0])
        assert len(runs) == again
        chat.ask(QUESTIONS[0], plan="random(keep=0.5)")
        assert len(runs) > again


def test_what_is_held_is_on_the_host_and_all_of_it(vlm: mm.VLM) -> None:
    chat = vlm.chat(WIDE, plan="random(keep=0.2)", retain="cpu", max_new_tokens=1)
    report = chat.ask(QUESTIONS[0]).report
    held: list[torch.Tensor] = chat.retained._kept["image"][0]  # type: ignore[union-attr]
    assert all(each.device.type == "cpu" for each in held)
    assert sum(len(each) for each in held) >= report.rows[0].visual_total > report.rows[0].kept_per_layer[0]
    with pytest.raises(InputError, match="neither 'cpu' nor None"):
        vlm.chat(WIDE, retain="disk")  # type: ignore[arg-type]


def test_methods_say_whether_the_first_question_decides() -> None:
    """Those that ask for the question, or for attention of text, in any of their stages."""
    said = {each["name"]: each.get("many_turns") for each in describe_methods()}
    assert said["fastv"] is False
    assert said["random"] is True
    assert said["vcd"] is None
    checkpoint = Checkpoint(build("llava"), 4)
    given: dict[str, Any] = {"dyvte": {"gates": str(GATES)}, "urag": {"head": str(HEAD)}, "exit": {"layer": 2}}
    for method in methods():
        if issubclass(method, Reducer):
            stages = method(**given.get(method.name, {})).stages(checkpoint)
            assert said[method.name] == (not any(stage.needs & ASKING for stage in stages)), method.name
