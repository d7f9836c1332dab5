"""Fine-tune the reference model on a public set: ``python -m mmefficient.models.reference.easy_vqa --out DIR``.

easy-VQA (the PyPI package `easy-vqa`, extra `eval`): 4,000 training pictures of one shape with 38,575 questions. The
optimisers and the learning-rate schedule are those of the pre-training; only the answer is learnt from. Its official
test split is the evaluation task of the same name: ``mmefficient eval --task easy-vqa --model DIR/checkpoint``.
"""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import path as checkpoint_path
from .train import LOG_EVERY, Phase, optimizers


class Pairs(Dataset[tuple[Path, str, str]]):
    """(picture, question, answer) of one split, in the order of its file."""

    def __init__(self, root: Path, split: str = "train") -> None:
        self.images = root / split / "images"
        self.rows: list[list[Any]] = json.loads((root / split / "questions.json").read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Path, str, str]:
        question, answer, image = self.rows[index]
        return self.images / f"{image}.png", question, answer


class Collate:
    """Model inputs of a batch, padded on the left, and the labels of its last positions."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[tuple[Path, str, str]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        prompts, pictures, lengths = [], [], []
        for path, question, answer in rows:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            ending = f" {answer}{tokenizer.eos_token}"
            prompts.append(prompt + ending)
            lengths.append(len(tokenizer(ending, add_special_tokens=False).input_ids))
            pictures.append(Image.open(path).convert("RGB"))
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False}  # the template writes <s>
        batch = dict(self.processor(images=pictures, text=prompts, return_tensors="pt", **options))
        most = max(lengths)
        ignored = torch.arange(most) < most - torch.tensor(lengths)[:, None]
        return batch | {"labels": batch["input_ids"][:, -most:].masked_fill(ignored, -100)}


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; ``batch["labels"]`` int64 [B, A] are those of the last A positions."""
    labels = batch.pop("labels")
    logits = model(**batch, logits_to_keep=labels.shape[1] + 1, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


class Tuning:
    """A run over whole epochs, and its state on disk."""

    def __init__(self, out: Path, rows: Dataset[Any], count: int, batch_size: int, device: str) -> None:
        self.out, self.rows, self.device = out, rows, device
        self.batch_size = min(batch_size, count)
        self.steps = count // self.batch_size
        self.processor = AutoProcessor.from_pretrained(checkpoint_path())
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint_path(), dtype=torch.float32)
        self.model.to(device).train()
        self.opts = optimizers(self.model)
        self.epoch = 0
        out.mkdir(parents=True, exist_ok=True)
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=device, weights_only=True)
            self.epoch = state["epoch"]
            self.model.load_state_dict(state["model"])
            for opt, saved in zip(self.opts, state["optimizers"], strict=True):
                opt.load_state_dict(saved)

    def train(self, phase: Phase, seed: int, workers: int) -> None:
        """One epoch, in an order that depends on the seed and the epoch alone."""
        loader = DataLoader(
            self.rows,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed * 1000 + self.epoch),
            num_workers=workers,
            collate_fn=Collate(self.processor),
            pin_memory=self.device == "cuda",
        )
        began, losses = time.monotonic(), []
        for number, batch in enumerate(loader, 1):
            for opt in self.opts:
                for group in opt.param_groups:
                    group["lr"] = phase.rate(self.epoch * self.steps + number - 1)
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = answer_loss(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for opt in self.opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if number % LOG_EVERY == 0 or number == self.steps:
                speed = number * self.batch_size / (time.monotonic() - began)
                mean = round(float(torch.stack(losses).mean()), 4)
                losses = []
                self.log({"epoch": self.epoch, "step": number, "loss": mean, "questions_per_s": round(speed)})
        self.epoch += 1

    def log(self, record: dict[str, float]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def save(self) -> None:
        states = [opt.state_dict() for opt in self.opts]
        state = {"epoch": self.epoch, "model": self.model.state_dict(), "optimizers": states}
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")

    def export(self) -> None:
        """Write ``checkpoint/`` in the Hugging Face format, in bf16."""
        self.model.to(torch.bfloat16).save_pretrained(self.out / "checkpoint", max_shard_size="14MB")
        self.processor.save_pretrained(self.out / "checkpoint")


def main(
    out: Annotated[Path, typer.Option(help="Where state, log and checkpoint go; an existing state is resumed.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the set; default: the installed package's.")] = None,
    epochs: Annotated[int, typer.Option(help="Times every question is seen.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Questions per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    limit: Annotated[int | None, typer.Option(help="Use the first so many questions only.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = max(0, (os.cpu_count() or 1) - 2),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Fine-tune on the training split, or go on from DIR/state.pt after the last whole epoch."""
    if data is None:
        spec = find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise typer.BadParameter("give --data, or install the set: pip install 'mmefficient[eval]'.")
        data = Path(spec.origin).parent / "data"
    pairs = Pairs(data)
    count = min(limit or len(pairs), len(pairs))
    tuning = Tuning(out, Subset(pairs, range(count)), count, batch_size, device)
    phase = Phase("easy-vqa", epochs * tuning.steps, lr, decay=0.9)
    while tuning.epoch < epochs:
        tuning.train(phase, seed, workers)
        tuning.save()
    tuning.export()


if __name__ == "__main__":
    typer.run(main)
