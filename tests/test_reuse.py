"""A picture that is read once answers like the picture itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import mmefficient as mm
from mmefficient.errors import InputError, PlanError
from mmefficient.flops import layer_flops, pair_flops, token_flops
from mmefficient.points import Pattern, Reducer
from mmefficient.profiles import Checkpoint
from mmefficient.tokens import Role
from tests.executor.test_batches import PLANS as EVERY_REDUCER
from tests.tiny import FAMILIES, LAYERS, build
from tests.tiny_checkpoint import processor

OF_QUESTION = {"last_row_attention", "own_row_attention", "question_attention", "question", "match"}
WIDE = Image.linear_gradient("L").resize((40, 24))
TALL = Image.radial_gradient("L").resize((20, 50))
QUESTIONS = ["what is in the picture?", "a cat?", "how many dogs are there in the picture"]
PLANS = ["none", "composite", "shortv(layers=(1,2))", "no_visual_self(scope=nothing)+exit(layer=2)", "random(keep=5)"]


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> mm.VLM:
    return mm.VLM(build(request.param), processor(request.param), engine="eager")


@pytest.mark.parametrize("plan", PLANS)
def test_answers_are_those_of_asking_with_the_picture(vlm: mm.VLM, plan: str) -> None:
    for picture in (WIDE, [TALL, WIDE]):
        kept = vlm.encode(picture, plan=plan)
        vlm.ask(WIDE, "a bus?", plan="none", max_new_tokens=1)  # another prompt in between changes nothing
        for question in QUESTIONS:
            expected = vlm.ask(picture, question, plan=plan, max_new_tokens=6)
            answer = vlm.ask(kept, question, max_new_tokens=6)
            assert answer.text == expected.text
            assert answer.report.rows == expected.report.rows
            assert answer.report.stored_tokens == expected.report.stored_tokens
            assert answer.report.prefill_flops_without_plan == expected.report.prefill_flops_without_plan


@pytest.mark.parametrize("plan", PLANS[:4])
def test_logits_and_batches(vlm: mm.VLM, plan: str) -> None:
    """The first token's logits, of a padded batch of questions."""
    kept = vlm.encode(WIDE, plan=plan)
    found: dict[bool, list[torch.Tensor]] = {}
    seen: list[torch.Tensor] = []
    handle = vlm.model.register_forward_hook(lambda module, args, out: seen.append(out.logits[:, -1].clone()))
    try:
        answers = vlm.ask_batch([(kept, each) for each in QUESTIONS], max_new_tokens=4)
        found[True] = list(seen[0])
        seen.clear()
        alone = [vlm.ask(WIDE, each, plan=plan, max_new_tokens=4) for each in QUESTIONS]
        found[False] = [each[0] for each in seen[::4]]
    finally:
        handle.remove()
    assert [each.text for each in answers] == [each.text for each in alone]
    torch.testing.assert_close(torch.stack(found[True]), torch.stack(found[False]), rtol=0, atol=1e-4)


def test_mixed_batches_keep_their_order() -> None:
    vlm = mm.VLM(build("llava"), processor())
    one, two = vlm.encode(WIDE), vlm.encode(TALL)
    rows: list[Any] = [(one, "a cat?"), (TALL, "a dog?"), (two, "a cat?"), (one, "a bus?")]
    answers = vlm.ask_batch(rows, max_new_tokens=4)
    assert not one.alone
    pictures = [WIDE, TALL, TALL, WIDE]
    alone = [vlm.ask(picture, row[1], max_new_tokens=4) for picture, row in zip(pictures, rows, strict=True)]
    assert [each.text for each in answers] == [each.text for each in alone]


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_keys_that_count_by_size_serve_one_question_at_a_time(family: str) -> None:
    vlm, plan = mm.VLM(build(family), processor(family)), "pact(layer=1,keep=0.8,cutoff=0.4,reach=1.5)"
    kept = vlm.encode(WIDE, plan=plan)
    assert kept.alone
    answers = vlm.ask_batch([(kept, each) for each in QUESTIONS], max_new_tokens=5)
    alone = [vlm.ask(WIDE, each, plan=plan, max_new_tokens=5) for each in QUESTIONS]
    assert [each.text for each in answers] == [each.text for each in alone]


def test_what_a_question_costs() -> None:
    """Only its own rows, over what each layer kept of the picture."""
    vlm = mm.VLM(build("llava"), processor())
    kept = vlm.encode(WIDE, plan="exit(layer=1)")
    report = vlm.ask(kept, "a cat?", max_new_tokens=1).report
    config = vlm.model.config.text_config
    read, visual = kept.ids.shape[1], 16
    asked = report.stored_tokens - report.reused_tokens
    assert asked % LAYERS == 0
    t = asked // LAYERS
    held = LAYERS * read - (LAYERS - 1) * visual
    assert report.reused_tokens == held == kept.report.stored_tokens
    pairs = t * held + LAYERS * t * t
    assert report.prefill_flops == LAYERS * t * token_flops(config) + pairs * pair_flops(config)
    assert report.prefill_flops_without_plan == LAYERS * layer_flops(config, read + t)


def test_the_kept_picture_is_not_written_to() -> None:
    vlm = mm.VLM(build("llava"), processor())
    kept = vlm.encode(WIDE, plan="composite")
    before = [layer.keys.clone() for layer in kept.cache.layers]
    vlm.ask_batch([(kept, "a cat?"), (kept, "a dog?")], max_new_tokens=3)
    for layer, keys in zip(kept.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("plan", ["modality_mutual", "fastv(layer=1,keep=4)", "pai(alpha=0.5)", "vcd"])
def test_plans_that_know_the_question_are_refused(plan: str) -> None:
    vlm = mm.VLM(build("llava"), processor())
    assert not mm.Plan(plan).reusable
    with pytest.raises(PlanError, match="depends on the question"):
        vlm.encode(WIDE, plan=plan)


def test_what_does_not_fit_is_refused() -> None:
    vlm = mm.VLM(build("llava"), processor())
    kept = vlm.encode(WIDE, plan="composite")
    with pytest.raises(PlanError, match="encode anew"):
        vlm.ask(kept, "a cat?", plan="none")
    with pytest.raises(PlanError, match="encode anew"):
        mm.VLM(build("llava"), processor()).ask(kept, "a cat?")
    with pytest.raises(InputError, match="placeholder"):
        vlm.ask(kept, "a <image> cat?")
    with pytest.raises(InputError, match="beams"):
        vlm.ask(kept, "a cat?", num_beams=2)
    with pytest.raises(InputError, match="no image"):
        vlm.encode(None, plan="composite")


def test_a_method_says_what_its_stages_and_pairs_depend_on() -> None:
    checkpoint = Checkpoint(build("llava"), LAYERS)
    for text in [*EVERY_REDUCER, "yopo(exit=2)", "shortv(layers=(1,2))"]:
        for method in mm.Plan(text).methods:
            if isinstance(method, Reducer):
                assert method.many_turns == (not any(each.needs & OF_QUESTION for each in method.stages(checkpoint)))
    for kind in mm.methods():
        if issubclass(kind, Pattern):
            assert kind.many_turns == (not kind().pairs().anywhere[Role.IMAGE] >> Role.QUESTION & 1), kind.name
