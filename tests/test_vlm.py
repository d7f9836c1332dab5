from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteriaList

import mmefficient as mm
from mmefficient.errors import BudgetError, InputError, PlanError, SilentPlanError, UnknownMethodError
from mmefficient.messages import user_message
from mmefficient.models import reference
from tests.tiny import FAMILIES, build
from tests.tiny_checkpoint import LAYERS, VISUAL_TOKENS, processor

WIDE = Image.linear_gradient("L").resize((40, 24))
TALL = Image.radial_gradient("L").resize((20, 50))
PLAN = "fastv(layer=1,keep=4)"
QUESTION = "what is in the picture?"


@pytest.fixture(scope="module", params=FAMILIES)
def any_vlm(request: pytest.FixtureRequest) -> mm.VLM:
    return mm.VLM(build(request.param), processor(request.param))


@pytest.fixture(scope="module")
def vlm() -> mm.VLM:
    return mm.VLM(build("llava"), processor())


@pytest.mark.parametrize("plan", ["none", PLAN, "exit(layer=2)"])
def test_a_ragged_batch_answers_row_by_row_like_single_questions(any_vlm: mm.VLM, plan: str) -> None:
    rows = [(WIDE, QUESTION), (None, "how many dogs are there?"), ([WIDE, TALL], "a cat?"), (TALL, "is it a bus?")]
    batch = any_vlm.ask_batch(rows, plan=plan, max_new_tokens=5)
    for (image, question), answer in zip(rows, batch, strict=True):
        alone = any_vlm.ask(image, question, plan=plan if image is not None else "none", max_new_tokens=5)
        assert answer.text == alone.text
        assert answer.report.rows == alone.report.rows
        for layer in range(LAYERS):
            assert torch.equal(answer.report.kept(0, layer), alone.report.kept(0, layer))
        assert torch.equal(answer.report.places[0], alone.report.places[0])


def test_the_text_is_that_of_the_stock_model(any_vlm: mm.VLM) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": WIDE.convert("RGB")}, _text(QUESTION)]}]
    inputs = any_vlm.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = any_vlm.model.generate(**inputs, do_sample=False, max_new_tokens=6)
    (expected,) = any_vlm.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert any_vlm.ask(WIDE, QUESTION, max_new_tokens=6).text == expected.strip()
    assert "".join(any_vlm.stream(WIDE, QUESTION, max_new_tokens=6)).strip() == expected.strip()


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_the_report_says_what_stayed_and_where_the_time_went(vlm: mm.VLM) -> None:
    report = vlm.ask(WIDE, QUESTION, plan=PLAN, max_new_tokens=3).report
    assert report.plan == PLAN
    assert report.rows[0].visual_total == VISUAL_TOKENS
    assert report.rows[0].kept_per_layer == [VISUAL_TOKENS] + [4] * (LAYERS - 1)
    assert len(report.kept(0, 1)) == 4
    assert report.prefill_flops < report.prefill_flops_without_plan
    assert set(report.stages_ms) == {"preprocess", "vision", "prefill", "decode"}
    assert min(report.stages_ms.values()) > 0
    assert report.generated_tokens == 3


def test_beams_keep_one_report_row_per_question(vlm: mm.VLM) -> None:
    answers = vlm.ask_batch([(None, "cats?"), (WIDE, QUESTION)], plan=PLAN, num_beams=3, max_new_tokens=3)
    assert [answer.report.rows[0].visual_total for answer in answers] == [0, VISUAL_TOKENS]


def test_generated_tokens_end_with_the_end_token(vlm: mm.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = torch.tensor([[5, 7, 6, 6], [5, 5, 5, 5], [6, 0, 0, 0]])
    for end in (6, [6, 8]):
        monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end)
        assert vlm._lengths(generated, {}) == [3, 4, 1]
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    assert vlm._lengths(generated, {}) == [4, 4, 4]


def test_the_plan_of_a_call_replaces_the_default() -> None:
    vlm = mm.VLM(build("llava"), processor(), plan=PLAN)
    other = mm.Plan("exit(layer=2)")
    assert vlm.ask(WIDE, QUESTION, max_new_tokens=1).report.plan == PLAN
    assert vlm.ask(WIDE, QUESTION, plan=other, max_new_tokens=1).report.plan == str(other)
    assert vlm.ask(WIDE, QUESTION, plan="none", max_new_tokens=1).report.plan == "none"
    chat = vlm.chat(WIDE, max_new_tokens=1)
    assert chat.ask(QUESTION).report.plan == PLAN
    assert chat.ask(QUESTION, plan="none").report.plan == "none"
    assert vlm.chat(WIDE, plan=other, max_new_tokens=1).ask(QUESTION).report.plan == str(other)


def test_no_questions_no_answers(vlm: mm.VLM) -> None:
    assert vlm.ask_batch([]) == []


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (InputError, "There is no image", lambda vlm: vlm.ask("nowhere.png", "a?")),
        (InputError, r"Row 0 has 1 image.* 2 placeholder", lambda vlm: vlm.ask(WIDE, "<image> a?")),
        (InputError, r"Row 1 has 0 image", lambda vlm: vlm.ask_batch([(WIDE, "a?"), (None, "<image>")])),
        (InputError, "has no image", lambda vlm: vlm.ask(None, "a?", plan=PLAN)),
        (InputError, "one sequence", lambda vlm: vlm.ask(WIDE, "a?", num_beams=2, num_return_sequences=2)),
        (UnknownMethodError, "fastv", lambda vlm: vlm.ask(WIDE, "a?", plan="fastvv(layer=1,keep=4)")),
        (PlanError, "out of range", lambda vlm: vlm.ask(WIDE, "a?", plan="exit(layer=99)")),
        (BudgetError, "row 1", lambda vlm: vlm.ask_batch([(None, "a?"), (WIDE, "a?")], plan="random(keep=17)")),
        (BudgetError, "keep", lambda vlm: vlm.ask(WIDE, "a?", plan="random(keep=0.0)")),
        (InputError, "placeholder", lambda vlm: vlm.stream(WIDE, "<image>")),
        (InputError, "streamer of its own", lambda vlm: vlm.stream(WIDE, "a?", streamer=object())),
        (InputError, "text, not a NoneType", lambda vlm: vlm.ask(WIDE, None)),
        (InputError, "text, not a list", lambda vlm: vlm.ask(WIDE, ["a?", "b?"])),
        (InputError, "no image to encode", lambda vlm: vlm.encode([])),
        (InputError, "40 x 0 pixels", lambda vlm: vlm.ask(Image.new("RGB", (40, 0)), "a?")),
        (PlanError, "not a plan", lambda vlm: vlm.ask(WIDE, "a?", plan=5)),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_trace(
    vlm: mm.VLM, error: type[Exception], sentence: str, call: Callable[[mm.VLM], Any]
) -> None:
    before = vlm.ask(WIDE, QUESTION, max_new_tokens=4).text
    with pytest.raises(error, match=sentence) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)
    assert vlm.ask(WIDE, QUESTION, max_new_tokens=4).text == before
    assert "get_image_features" not in vars(vlm.model.base_model)


def test_what_the_processor_refuses_is_an_input_error() -> None:
    vlm = mm.VLM(build("qwen2_5_vl"), processor("qwen2_5_vl"))
    with pytest.raises(InputError, match="processor refuses"):
        vlm.ask(Image.new("RGB", (1000, 2)), QUESTION)


def test_a_tokenizer_without_padding_answers_one_question_at_a_time() -> None:
    vlm = mm.VLM(build("llava"), processor())
    expected = vlm.ask(WIDE, QUESTION, max_new_tokens=3).text
    vlm.processor.tokenizer.pad_token = None
    assert vlm.ask(WIDE, QUESTION, max_new_tokens=3).text == expected
    with pytest.raises(InputError, match="pad_token"):
        vlm.ask_batch([(WIDE, QUESTION), (WIDE, "a?")], max_new_tokens=3)


def test_greedy_decoding_does_not_warn_about_sampling_defaults(caplog: pytest.LogCaptureFixture) -> None:
    vlm = mm.VLM(build("llava"), processor())
    vlm.model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9, top_k=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = {vlm.ask(WIDE, QUESTION, max_new_tokens=8).text for _ in range(4)}
    assert len(texts) == 1
    assert not caplog.records
    assert vlm.ask(WIDE, QUESTION, do_sample=True, temperature=9.0, max_new_tokens=8).text


def test_generate_keywords_pass_through(vlm: mm.VLM) -> None:
    answer = vlm.ask(WIDE, QUESTION, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert answer.report.generated_tokens == 2
    with pytest.raises(ValueError, match="no_such_keyword"):
        vlm.ask(WIDE, QUESTION, no_such_keyword=1)


def test_what_a_call_says_about_its_length_replaces_the_defaults(vlm: mm.VLM) -> None:
    whole = vlm.ask(WIDE, QUESTION, max_new_tokens=6)
    given = vlm.ask(WIDE, QUESTION, generation_config=GenerationConfig(max_new_tokens=6))
    assert (given.text, given.report.generated_tokens) == (whole.text, 6)
    inputs = vlm._encode([[user_message([WIDE], QUESTION)]], mm.Plan())
    length = inputs["input_ids"].shape[1]
    assert vlm.ask(WIDE, QUESTION, max_length=length + 6).report.generated_tokens == 6
    assert "".join(vlm.stream(WIDE, QUESTION, max_new_tokens=6, stopping_criteria=None)).strip() == whole.text


@pytest.mark.parametrize("where", ["keyword", "config"])
def test_an_end_token_of_the_call_ends_rows(vlm: mm.VLM, where: str) -> None:
    rows = [(WIDE, QUESTION), (TALL, "is it a bus?")]
    ids = [vlm.processor.tokenizer(each.text, add_special_tokens=False).input_ids for each in vlm.ask_batch(rows)]
    end = next(token for token in ids[0] if ids[0].index(token) != [*ids[1], token].index(token))
    options: dict[str, Any] = {"eos_token_id": end, "max_new_tokens": 30, "pad_token_id": 0}
    if where == "config":
        options = {"generation_config": GenerationConfig(**options)}
    answers = vlm.ask_batch(iter(rows), **options)
    expected = [min([*each, end].index(end) + 1, 30) for each in ids]
    assert [answer.report.generated_tokens for answer in answers] == expected


def test_stop_strings_stop_on_any_engine() -> None:
    loaded = mm.VLM.from_pretrained("reference", device="cpu")
    options = {"stop_strings": ["frog"], "tokenizer": loaded.processor.tokenizer}
    assert loaded.ask(reference.sample_picture(), "Describe the image.", **options).text.endswith("frog")


def test_reports_know_their_rows_and_layers(vlm: mm.VLM) -> None:
    report = vlm.ask(WIDE, QUESTION, plan=PLAN, max_new_tokens=1).report
    assert len(report.kept(0, LAYERS - 1)) == 4
    for row, layer in ((1, 0), (-1, 0), (0, LAYERS), (0, -1)):
        with pytest.raises(InputError, match=f"rows 0 to 0 and layers 0 to {LAYERS - 1}"):
            report.kept(row, layer)


@pytest.mark.parametrize("plan", ["none", "random(keep=0.5)", "fastervlm(keep=4)"])
def test_without_a_cache_every_step_reads_the_picture_that_was_encoded(vlm: mm.VLM, plan: str) -> None:
    texts = {vlm.ask(WIDE, QUESTION, plan=plan, max_new_tokens=4, use_cache=cached).text for cached in (True, False)}
    assert len(texts) == 1


def test_chat_remembers_turns_but_not_failures(vlm: mm.VLM) -> None:
    chat = vlm.chat(WIDE, max_new_tokens=3)
    first = chat.ask(QUESTION)
    with pytest.raises(InputError):
        chat.ask("<image> and now?")
    second = chat.ask("how many?", plan=PLAN)
    third = chat.ask("and here?", image=TALL)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    assert chat.messages[1]["content"] == [_text(first.text)]
    assert first.report.rows[0].visual_total == second.report.rows[0].visual_total == VISUAL_TOKENS
    assert third.report.rows[0].visual_total == 2 * VISUAL_TOKENS
    prompt = vlm.processor.apply_chat_template(chat.messages[:3], add_generation_prompt=True)
    assert first.text in prompt
    assert prompt.count("<image>") == 1


def test_conversations_in_chat_format_are_answered_in_one_batch(vlm: mm.VLM) -> None:
    asked = [{"role": "user", "content": [{"type": "image", "image": WIDE}, _text(QUESTION)]}]
    said = [*asked, {"role": "assistant", "content": [_text("a dog")]}, {"role": "user", "content": [_text("what?")]}]
    answers = vlm.converse([asked, said], plan=PLAN, max_new_tokens=4)
    assert answers[0].text == vlm.ask(WIDE, QUESTION, plan=PLAN, max_new_tokens=4).text
    assert answers[1].text == vlm.converse([said], plan=PLAN, max_new_tokens=4)[0].text
    assert vlm.converse([], plan=PLAN) == []


def test_a_stream_ends_early_and_passes_errors_on(vlm: mm.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    class Count:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            steps.append(ids.shape[1])
            return torch.zeros(len(ids), dtype=torch.bool)

    pieces = vlm.stream(WIDE, QUESTION, max_new_tokens=300, stopping_criteria=StoppingCriteriaList([Count()]))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert 0 < len(steps) < 300
    assert vlm.ask(WIDE, QUESTION, max_new_tokens=1).text

    with pytest.raises(ValueError, match="beam"):
        list(vlm.stream(WIDE, QUESTION, num_beams=2))
    with pytest.raises(PlanError, match="out of range"):
        list(vlm.stream(WIDE, QUESTION, plan="exit(layer=99)"))


def test_a_stream_under_a_plan_says_what_ask_says(vlm: mm.VLM) -> None:
    streamed = "".join(vlm.stream(WIDE, QUESTION, plan=PLAN, max_new_tokens=6)).strip()
    assert streamed == vlm.ask(WIDE, QUESTION, plan=PLAN, max_new_tokens=6).text


def test_threads_do_not_mix_plans(vlm: mm.VLM) -> None:
    plans = ["none", PLAN, "exit(layer=2)", "random(keep=3,seed=1)"]
    expected = {plan: vlm.ask(WIDE, QUESTION, plan=plan, max_new_tokens=4) for plan in plans}
    failures: list[str] = []

    def work(plan: str) -> None:
        for _ in range(4):
            answer = vlm.ask(WIDE, QUESTION, plan=plan, max_new_tokens=4)
            same = answer.text == expected[plan].text and answer.report.rows == expected[plan].report.rows
            failures.extend([] if same else [plan])

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_saved_checkpoint_answers_like_the_model_it_was_saved_from(checkpoint: Path, picture: Path) -> None:
    loaded = mm.VLM.from_pretrained(checkpoint, plan=PLAN, device="cpu")
    again = mm.VLM(build("llava"), processor(), plan=PLAN)
    assert loaded.ask(picture, QUESTION, max_new_tokens=5).text == again.ask(picture, QUESTION, max_new_tokens=5).text


def test_a_plan_that_never_acts_is_an_error(vlm: mm.VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmefficient.executor.Executor.on_layer", lambda *_: None)
    monkeypatch.setattr(vlm, "engine", "eager")
    with pytest.raises(SilentPlanError, match="never acted"):
        vlm.ask(WIDE, QUESTION, plan=PLAN, max_new_tokens=1)
