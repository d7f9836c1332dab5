"""Fine-tuning on easy-VQA: what is learnt from, and that a run can be taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from mmefficient.models import reference
from mmefficient.models.reference import easy_vqa

QUESTIONS = [
    ["what color is the shape?", "red", 0],
    ["is there a circle?", "no", 0],
    ["what shape is in the image?", "rectangle", 1],
    ["does the image not contain a teal shape?", "yes", 1],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("easy-vqa")
    (root / "train" / "images").mkdir(parents=True)
    for index, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (64, 64), colour).save(root / "train" / "images" / f"{index}.png")
    (root / "train" / "questions.json").write_text(json.dumps(QUESTIONS))
    return root


def test_only_the_answer_and_its_end_are_learnt(data: Path) -> None:
    processor = AutoProcessor.from_pretrained(reference.path())
    every = easy_vqa.EasyVQA(data, processor, "cpu")
    batch = every.batch(torch.arange(len(every)))
    learnt = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == [f" {answer}</s>" for _, answer, _ in QUESTIONS]
    model = AutoModelForImageTextToText.from_pretrained(reference.path(), dtype=torch.float32)
    losses = []
    for index, (question, answer, image) in enumerate(QUESTIONS):  # alone, as the processor and the model's own loss do
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(data / "train" / "images" / f"{image}.png")
        text = f"{prompt} {answer}</s>"
        alone = processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=False)
        real = batch["attention_mask"][index].bool()
        assert torch.equal(batch["input_ids"][index][real], alone["input_ids"][0])
        torch.testing.assert_close(batch["pixel_values"][index], alone["pixel_values"][0], atol=1e-4, rtol=1e-4)
        count = int((batch["labels"][index] != -100).sum())
        labels = alone["input_ids"].clone()
        labels[:, :-count] = -100
        losses.append((float(model(**alone, labels=labels).loss.detach()), count))
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert float(easy_vqa.answer_loss(model, batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_a_run_is_taken_up_after_its_last_whole_epoch(data: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(easy_vqa.main)

    def train(out: Path, epochs: int) -> None:
        args = ["--out", str(out), "--data", str(data), "--epochs", str(epochs), "--batch-size", "2", "--limit", "2"]
        result = CliRunner().invoke(app, [*args, "--device", "cpu"])
        assert result.exit_code == 0, result.output

    train(tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    train(tmp_path, 2)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]
    assert type(AutoProcessor.from_pretrained(tmp_path / "checkpoint")).__name__ == "LlavaProcessor"
