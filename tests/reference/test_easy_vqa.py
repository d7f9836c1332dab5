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
    pairs = easy_vqa.Pairs(data)
    batch = easy_vqa.Collate(processor)([pairs[i] for i in range(len(pairs))])
    learnt = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == [f" {answer}</s>" for _, answer, _ in QUESTIONS]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0][0]}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    alone = processor.tokenizer(
        prompt.replace("<image>", "<image>" * 576) + " red</s>", add_special_tokens=False
    ).input_ids
    real = batch["attention_mask"][0].bool()
    assert batch["input_ids"][0][real].tolist() == alone
    model = AutoModelForImageTextToText.from_pretrained(reference.path(), dtype=torch.float32)
    rows = []
    for index in range(len(pairs)):  # unpadded, through the model's own loss
        single = easy_vqa.Collate(processor)([pairs[index]])
        answer = single.pop("labels")
        labels = torch.full_like(single["input_ids"], -100)
        labels[:, -answer.shape[1] :] = answer
        rows.append((float(model(**single, labels=labels).loss), int((labels != -100).sum())))
    expected = sum(loss * count for loss, count in rows) / sum(count for _, count in rows)
    assert float(easy_vqa.answer_loss(model, batch)) == pytest.approx(expected, rel=1e-4)


def test_a_run_is_taken_up_after_its_last_whole_epoch(data: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(easy_vqa.main)

    def train(out: Path, epochs: int) -> None:
        args = ["--out", str(out), "--data", str(data), "--epochs", str(epochs), "--batch-size", "2", "--limit", "2"]
        result = CliRunner().invoke(app, [*args, "--workers", "0", "--device", "cpu"])
        assert result.exit_code == 0, result.output

    train(tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    train(tmp_path, 2)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]
    assert type(AutoProcessor.from_pretrained(tmp_path / "checkpoint")).__name__ == "LlavaProcessor"
