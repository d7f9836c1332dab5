"""Verified decoding: forks are what a recomputation gives, and only what passes becomes context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import mmefficient as mm
from mmefficient.errors import InputError, ModelError
from mmefficient.forks import Stored, padded
from mmefficient.sentences import Decoding, Units, verify_sentences
from mmefficient.verifiers import Probe, Prompts
from mmefficient.vlm import user_message
from tests.tiny import IMAGE, build
from tests.tiny_checkpoint import processor

FAMILIES = ("llava", "llava_next", "llava_onevision")
PICTURES = [Image.linear_gradient("L").resize((40, 24)), Image.radial_gradient("L").resize((20, 50))]
MARKS = ("w1", "w4", "w9", "w14", "w20", "w21", "w30", "dog", "the", "how", "?", "!", "left", "is", ",", "and")
Case = tuple[Any, Any, Any]


def inputs_of(
    model: Any, questions: Sequence[str] = ("what is it?", "how many dogs and cats are in the picture")
) -> Any:
    turns = [
        [user_message([picture.convert("RGB")], question)]
        for picture, question in zip(PICTURES, questions, strict=True)
    ]
    return model.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    own = processor(request.param)
    return build(request.param, seed=3), own, inputs_of(own)


def stock(model: Any, inputs: Any, most: int) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def one(inputs: Any, row: int, ids: torch.Tensor) -> dict[str, Any]:
    """Inputs of other ids [S] after the pictures of one row."""
    pictures = {name: value[row : row + 1] for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), **pictures}


def words(text: str) -> list[str]:
    """As objects: every word but the marks."""
    return [word for word in text.split() if word not in MARKS]


def everything(prompts: Prompts, asked: Sequence[tuple[int, str]]) -> list[bool]:
    return [True] * len(asked)


def test_units_begin_with_marks() -> None:
    tokenizer = processor().tokenizer
    units = Units(tokenizer, (",", "and"))
    dog, comma, ends, cat = tokenizer.convert_tokens_to_ids(["dog", ",", "and", "cat"])
    assert [units.first(ids) for ids in ([dog, comma], [comma, dog, cat, ends], [comma, dog], [])] == [1, 3, None, None]
    assert units.first([comma, dog, tokenizer.eos_token_id]) == 2
    with pytest.raises(InputError, match="no token of this tokenizer"):
        Units(tokenizer, ("nowhere",))


@pytest.mark.parametrize("width", [1, 3])
def test_where_everything_passes_the_answer_is_greedy(case: Case, width: int) -> None:
    model, own, inputs = case
    found = verify_sentences(model, own, inputs, objects=words, verify=everything, marks=MARKS, width=width,
                             max_new_tokens=24)  # fmt: skip
    assert [each.ids for each in found] == stock(model, inputs, 24)
    assert not any(each.rejected or each.cut or each.finished for each in found)


def test_the_end_of_the_answer_is_that_of_generate(case: Case) -> None:
    model, own, inputs = case
    plain = stock(model, inputs, 24)
    model.generation_config.eos_token_id = plain[0][9]
    try:
        found = verify_sentences(model, own, inputs, objects=words, verify=everything, marks=MARKS, max_new_tokens=24)
    finally:
        model.generation_config.eos_token_id = None
    for each, ids in zip(found, plain, strict=True):
        end = ids.index(plain[0][9]) if plain[0][9] in ids else len(ids)
        assert each.ids == ids[:end]
        assert each.finished == (end < len(ids))


def oracle(absent: set[str]) -> Callable[[Prompts, Sequence[tuple[int, str]]], list[bool]]:
    def verify(prompts: Prompts, asked: Sequence[tuple[int, str]]) -> list[bool]:
        return [name not in absent for _, name in asked]

    return verify


def test_what_is_not_there_is_never_said(case: Case) -> None:
    model, own, inputs = case
    said = [word for ids in stock(model, inputs, 24) for word in words(own.tokenizer.decode(ids))]
    absent = {said[0], said[-1]}
    found = verify_sentences(model, own, inputs, objects=words, verify=oracle(absent), marks=MARKS, width=4,
                             max_new_tokens=24)  # fmt: skip
    texts = [own.tokenizer.decode(each.ids) for each in found]
    assert not absent & {word for text in texts for word in words(text)}
    assert any(each.rejected for each in found)
    for each in found:
        assert all(absent & set(words(own.tokenizer.decode(unit))) for unit in each.rejected)
        assert each.cut or len(each.ids) == 24


def test_a_batch_answers_row_by_row(case: Case) -> None:
    model, own, inputs = case
    said = [word for ids in stock(model, inputs, 24) for word in words(own.tokenizer.decode(ids))]
    options: Any = {"objects": words, "verify": oracle({said[0], said[-1]}), "marks": MARKS, "max_new_tokens": 20}
    together = verify_sentences(model, own, inputs, **options)
    for row, question in enumerate(("what is it?", "how many dogs and cats are in the picture")):
        turn = [[user_message([PICTURES[row].convert("RGB")], question)]]
        alone = own.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert verify_sentences(model, own, alone, **options) == [together[row]]


def test_what_comes_next_is_what_a_recomputation_says(case: Case) -> None:
    """After every commit, greedy or in place of a rejected unit, the logits are those of reading all of it at once."""
    model, own, inputs = case
    said = [word for ids in stock(model, inputs, 24) for word in words(own.tokenizer.decode(ids))]
    units, compared = Units(own.tokenizer, MARKS), 0
    with torch.no_grad():
        decoding = Decoding(model, own, inputs, words, oracle({said[0], said[-1]}), units, 3)
        for _ in range(5):
            decoding.advance([row for row, each in enumerate(decoding.rows) if not each.cut])
            for row, each in enumerate(decoding.rows):
                ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                full = model(**one(inputs, row, torch.cat([ids, torch.tensor(each.ids, dtype=torch.long)])))
                torch.testing.assert_close(decoding.next[row], full.logits[0, -1], rtol=0, atol=2e-5)
                compared += bool(each.rejected)
    assert compared


def test_a_fork_equals_recomputation(case: Case) -> None:
    """Forked rows that read other tokens, and then more, give the logits of reading everything at once."""
    model, _, inputs = case
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    seen = inputs["attention_mask"].bool()
    place = (seen.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=place, past_key_values=cache, use_cache=True)
        stored = Stored(model, cache, seen, seen.sum(1))
        rows = torch.tensor([1, 0, 1])
        fork = stored.fork(rows)
        tails = [[5, 6, 7], [8], [9, 10]]
        fork.read(*padded(tails, rows.device))
        fork.seen[2, -3:] = False  # given up
        fork.position[2] -= 2
        more = [[11], [12], [13]]
        got = fork.read(*padded(more, rows.device))[:, -1]
        wanted = [[5, 6, 7, 11], [8, 12], [13]]
        for n, row in enumerate(rows.tolist()):
            ids = inputs["input_ids"][row][seen[row]]
            longer = torch.cat([ids, torch.tensor(wanted[n])])
            full = model(**one(inputs, row, longer)).logits[0, -1]
            torch.testing.assert_close(got[n], full, rtol=0, atol=2e-5)
    assert stored.seen.shape[1] == seen.shape[1] == cache.get_seq_length()


def test_a_probe_sees_the_picture_and_its_question_alone(case: Case) -> None:
    model, own, inputs = case
    probe = Probe(own, "is it a {}?".format)
    seen: list[Prompts] = []
    asked = [(0, "dog"), (1, "bus"), (1, "dogs and cats"), (0, "cat")]

    def verify(prompts: Prompts, _: Sequence[tuple[int, str]]) -> list[bool]:
        seen.append(prompts)
        return [True] * len(_)

    verify_sentences(model, own, inputs, objects=words, verify=verify, marks=MARKS, max_new_tokens=6)
    with torch.no_grad():
        margins = probe.margins(seen[-1], asked)
    yes, no = own.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for margin, (row, name) in zip(margins.tolist(), asked, strict=True):
        turn = [[user_message([PICTURES[row].convert("RGB")], f"is it a {name}?")]]
        alone = own.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**alone).logits[0, -1]
        assert margin == pytest.approx(float(logits[yes] - logits[no]), abs=2e-5)
    assert probe(seen[-1], []) == []
    low, high = (Probe(own, "is it a {}?".format, margin=each)(seen[-1], asked) for each in (-99.0, 99.0))
    assert (low, high) == ([True] * 4, [False] * 4)


def test_what_is_refused() -> None:
    model, own = build("llava"), processor()
    inputs = inputs_of(own)
    assert int((inputs["input_ids"] == IMAGE).sum()) == 32
    options: Any = {"objects": words, "verify": everything, "marks": MARKS}
    with pytest.raises(InputError, match="width=0"):
        verify_sentences(model, own, inputs, width=0, **options)
    with mm.Plan("vhr").apply(model), pytest.raises(ModelError, match="leave the plan"):
        verify_sentences(model, own, inputs, **options)
    with pytest.raises(ModelError, match="triplets"):
        verify_sentences(build("qwen2_5_vl"), processor("qwen2_5_vl"), {}, **options)
