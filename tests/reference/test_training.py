"""The training pass asks what inference asks: same tokens, same positions, same pixels, same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaProcessor

from mmefficient.models.reference import train
from mmefficient.models.reference.build import PATCHES, build_config, build_model, build_processor
from mmefficient.models.reference.data import IGNORE, MAX_ANSWER, SLOTS, Batches
from mmefficient.models.reference.objective import Objective
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.render import load_atlas
from mmefficient.models.reference.scenes.sample import Dice, sample_scene
from mmefficient.models.reference.scenes.splits import KINDS, picture


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def batches(processor: LlavaProcessor) -> Batches:
    return Batches(processor, 2, seed=0)


@pytest.fixture(scope="module")
def objective(processor: LlavaProcessor, batches: Batches) -> Objective:
    config = build_config(processor.tokenizer)
    config.text_config.num_hidden_layers = 6
    config.vision_config.num_hidden_layers = 3
    return Objective(build_model(config, 0), processor, batches, load_atlas(), torch.float32)


def test_names_and_words_are_whole_tokens(processor: LlavaProcessor) -> None:
    for cls in OBJECTS:
        for form in (cls.name, cls.plural):
            ids = processor.tokenizer(f" {form}", add_special_tokens=False).input_ids
            assert len(ids) == len(form.split()), form


def test_the_template_is_what_training_reads(processor: LlavaProcessor, batches: Batches) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "<s>USER: <image>\nIs there a dog in the image? ASSISTANT:"
    ids = processor.tokenizer(text.replace("<image>", "<image>" * PATCHES), add_special_tokens=False).input_ids
    slot = processor.tokenizer("Is there a dog in the image? ASSISTANT:", add_special_tokens=False).input_ids
    assert ids == batches.prefix + slot
    turns += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "Where?"}]
    chat = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert chat == text + " no</s>USER: Where? ASSISTANT:"


def test_a_batch_depends_on_its_step_alone(batches: Batches) -> None:
    first, again, other = batches[3], batches[3], batches[4]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tokens"], other["tokens"])


def test_nothing_is_cut_off(processor: LlavaProcessor) -> None:
    """Every slot holds its question and answer, over many pictures."""
    data = Batches(processor, 64, seed=1)
    batch = data[0]
    turns = torch.stack([batch["turn"][row][batch["labels"][row] != IGNORE].max() + 1 for row in range(64)])
    assert (turns == len(SLOTS) + 2).all()
    assert (batch["labels"] != IGNORE).sum(1).max() < MAX_ANSWER


def test_every_slot_gets_the_logits_of_the_stock_model(
    objective: Objective, processor: LlavaProcessor, batches: Batches
) -> None:
    batch = batches[0]
    with torch.no_grad():
        logits, _ = objective.logits(batch)
    model = objective.model.eval()
    trained_with = model.model.language_model.config._attn_implementation
    model.model.language_model.config._attn_implementation = "sdpa"
    checked = 0
    for row in range(2):
        image = picture(sample_scene(Dice(f"train/0/0/{row}")))
        for slot in (0, 9, 23, 24):
            start = batches.layout.starts[slot]
            ids = batch["tokens"][row, start : start + SLOTS[slot]]
            text = processor.tokenizer.decode(ids[ids != processor.tokenizer.pad_token_id])
            inputs = processor(images=image, text=f"USER: <image>\n{text}", return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).logits[0]
            for i, at in enumerate(batch["rows"][row].tolist()):
                if start <= at < start + SLOTS[slot] and batch["labels"][row, i] != IGNORE:
                    offset = len(batches.prefix) + at - start
                    torch.testing.assert_close(logits[row, i], expected[offset], atol=2e-5, rtol=0)
                    checked += 1
    model.model.language_model.config._attn_implementation = trained_with
    assert checked > 20


def test_every_parameter_learns(objective: Objective, batches: Batches) -> None:
    losses = objective(batches[0], torch.tensor([0.3, 0.5, 0.1]))
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert losses["asked"].sum() == 2 * (len(SLOTS) + 2)
    assert (losses["correct"] <= losses["asked"]).all()
    objective.zero_grad(set_to_none=True)


def test_patch_truth_points_at_centres(objective: Objective, batches: Batches) -> None:
    batch = batches[0]
    truth = objective.truth(batch)
    rows, patches = torch.nonzero(truth["cls"] >= 0, as_tuple=True)
    assert len(rows) > 0
    centres = objective.patch_centre[patches] + truth["offset"][rows, patches] * 56
    for row, centre, cls in zip(rows.tolist(), centres, truth["cls"][rows, patches].tolist(), strict=True):
        things = sample_scene(Dice(f"train/0/0/{row}")).things
        assert any(thing.cls == cls and torch.allclose(centre, torch.tensor(thing.centre)) for thing in things)


def test_a_run_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after one step and resumed, the weights are those of the uninterrupted run."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)

    def run(out: Path, minutes: float) -> None:
        train.main(
            out,
            tower_steps=1,
            steps=2,
            batch_size=1,
            minutes=minutes,
            workers=0,
            device="cpu",
            compile_model=False,
        )

    run(tmp_path / "whole", 60)
    for _ in range(4):  # each call stops at its first log line, or finishes a phase
        run(tmp_path / "parts", -1)
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert (whole["phase"], whole["step"]) == (parts["phase"], parts["step"]) == ("answers", 2)
    for name, value in whole["objective"].items():
        torch.testing.assert_close(parts["objective"][name], value, msg=name)
    records = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 1, 2]
    assert set(records[-1]["exact"]) <= set(KINDS)
    assert (tmp_path / "whole" / "checkpoint" / "config.json").exists()
