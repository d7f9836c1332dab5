"""Fine-tune the reference model on a public set: ``python -m mmefficient.models.reference.easy_vqa --out DIR``.

easy-VQA (the PyPI package `easy-vqa`, extra `eval`): 4,000 training pictures of one shape with 38,575 questions. The
optimisers and the learning-rate schedule are those of the pre-training; only the answer is learnt from. Its official
test split is the evaluation task of the same name: ``mmefficient eval --task easy-vqa --model DIR/checkpoint``.
"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import path as checkpoint_path
from .record import LOG_EVERY, keep, note
from .train import Phase, optimizers


class EasyVQA:
    """One split in device memory: every picture as the model's processor makes it, every question as a left-padded row.

    Attributes:
        pixels: [pictures, 3, H, W] in half precision; picture: int64 [questions], the picture each question is about.
        rows: int64 token ids per question: prompt, answer, end. answers: how many of them, at the end, are learnt from.
    """

    def __init__(self, root: Path, processor: Any, device: str, split: str = "train", limit: int | None = None) -> None:
        asked: list[list[Any]] = json.loads((root / split / "questions.json").read_text())[:limit]
        names = {name: index for index, name in enumerate(dict.fromkeys(name for _, _, name in asked))}
        chunks = list(names)
        self.pixels = torch.cat(
            [
                processor.image_processor(
                    [
                        Image.open(root / split / "images" / f"{name}.png").convert("RGB")
                        for name in chunks[at : at + 256]
                    ],
                    return_tensors="pt",
                    device=device,
                ).pixel_values.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
                for at in range(0, len(chunks), 256)
            ]
        )
        self.picture = torch.tensor([names[name] for _, _, name in asked], device=device)
        tokenizer, image = processor.tokenizer, processor.image_token
        self.pad = tokenizer.pad_token_id
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question, _, _ in asked
        ]
        prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
        filled = image * (self.pixels.shape[-1] // processor.patch_size) ** 2
        endings = [f" {answer}{tokenizer.eos_token}" for _, answer, _ in asked]
        texts = [prompt.replace(image, filled) + ending for prompt, ending in zip(prompts, endings, strict=True)]
        options = {"add_special_tokens": False}  # the template writes <s>
        self.rows = [torch.tensor(ids) for ids in tokenizer(texts, **options).input_ids]
        self.answers = [len(ids) for ids in tokenizer(endings, **options).input_ids]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Model inputs of the questions `index`, and the labels [B, A] of their last A positions."""
        chosen, device = index.tolist(), self.pixels.device
        ids = pad_sequence(
            [self.rows[i] for i in chosen], batch_first=True, padding_value=self.pad, padding_side="left"
        )
        lengths = torch.tensor([len(self.rows[i]) for i in chosen])
        answers = torch.tensor([self.answers[i] for i in chosen])
        seen = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        most = int(answers.max())
        labels = ids[:, -most:].masked_fill(torch.arange(most) < most - answers[:, None], -100)
        tensors = {"input_ids": ids, "attention_mask": seen.long(), "labels": labels}
        found = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return found | {"pixel_values": self.pixels[self.picture[index.to(device)]]}


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; ``batch["labels"]`` int64 [B, A] are those of the last A positions."""
    labels = batch.pop("labels")
    logits = model(**batch, logits_to_keep=labels.shape[1] + 1, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


class Tuning:
    """A run over whole epochs, and its state on disk."""

    def __init__(self, out: Path, data: Path, batch_size: int, limit: int | None, device: str) -> None:
        self.out, self.device = out, device
        self.processor = AutoProcessor.from_pretrained(checkpoint_path())
        self.data = EasyVQA(data, self.processor, device, limit=limit)
        self.batch_size = min(batch_size, len(self.data))
        self.steps = len(self.data) // self.batch_size
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

    def train(self, phase: Phase, seed: int) -> None:
        """One epoch, in an order that depends on the seed and the epoch alone."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed * 1000 + self.epoch))
        began, losses = time.monotonic(), []
        for number in range(1, self.steps + 1):
            for opt in self.opts:
                for group in opt.param_groups:
                    group["lr"] = phase.rate(self.epoch * self.steps + number - 1)
            batch = self.data.batch(order[(number - 1) * self.batch_size : number * self.batch_size])
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
                record = {"epoch": self.epoch, "step": number, "loss": mean, "questions_per_s": round(speed)}
                note(self.out, record)
        self.epoch += 1

    def save(self) -> None:
        states = [opt.state_dict() for opt in self.opts]
        keep(self.out, {"epoch": self.epoch, "model": self.model.state_dict(), "optimizers": states})

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
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Fine-tune on the training split, or go on from DIR/state.pt after the last whole epoch."""
    if data is None:
        spec = find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise typer.BadParameter("give --data, or install the set: pip install 'mmefficient[eval]'.")
        data = Path(spec.origin).parent / "data"
    tuning = Tuning(out, data, batch_size, limit, device)
    phase = Phase("easy-vqa", epochs * tuning.steps, lr, decay=0.9)
    while tuning.epoch < epochs:
        tuning.train(phase, seed)
        tuning.save()
    tuning.export()


if __name__ == "__main__":
    typer.run(main)
