"""Prompts with known answers to measure and train on: scenes that are in no evaluation split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.questions import training_question
from mmefficient.models.reference.scenes.render import load_atlas, render
from mmefficient.models.reference.scenes.sample import Dice, Scene, sample_scene, scene_tensors
from mmefficient.models.reference.scenes.splits import KINDS

IGNORE = -100
ASKED = tuple(kind for kind in KINDS if kind not in ("existence-popular", "existence-adversarial"))
NAMING = ("existence-random", "count", "position", "relation", "colour", "two-hop", "comparison")
MOST_LAYERS = 24  # drawn layers of a scene are padded to this


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers behind them, padded on the left.

    Attributes:
        ids, mask: int64 [B, S], the answer included, its end token not.
        labels: int64 [B, A], what the last A rows should predict: answer and end token; IGNORE before.
        answered: int64 [B], answer tokens in `ids`.
        kinds: int64 [B], into `ASKED`; page: int64 [B], the image the question is about.
        layers, background: the scenes, [B * pages, ...], as `render` takes them.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    answered: torch.Tensor
    kinds: torch.Tensor
    page: torch.Tensor
    layers: torch.Tensor
    background: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def question(self, image_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the text after the last image up to the prompt's end, int64 [B, Q], and which are used."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        later = (self.ids == image_token).long().flip(1).cumsum(1).flip(1) == 0
        at = later & (column < (len(column) - self.answered)[:, None])
        index = at.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(at.sum(1).max())]
        return index, at.gather(1, index)


class Prompts(Dataset[Batch]):
    """``self[step]``: `rows` prompts of `pages` pictures each; a function of the seed and the step.

    With several pages the question names something that is on one of them alone.
    """

    def __init__(self, processor: Any, rows: int, seed: str, pages: int = 1) -> None:
        tokenizer = processor.tokenizer
        self.tokenizer, self.rows, self.seed, self.pages = tokenizer, rows, seed, pages
        image = processor.image_token
        size = processor.image_processor.crop_size["height"] // processor.patch_size
        text = "USER: " + f"{image * size**2}\n" * pages
        self.prefix: list[int] = tokenizer(text).input_ids
        self.end: int = tokenizer.eos_token_id

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> Batch:
        drawn = [self._draw(Dice(f"fit/{self.seed}/{step}/{row}")) for row in range(self.rows)]
        asked = self._ids([f"{question} ASSISTANT:" for _, _, _, question, _ in drawn])
        answers = self._ids([f" {answer}" for *_, answer in drawn])
        ids = [[*self.prefix, *q, *a] for q, a in zip(asked, answers, strict=True)]
        layers, background = scene_tensors([scene for scenes, *_ in drawn for scene in scenes], MOST_LAYERS)
        padded, mask = _left([torch.tensor(row) for row in ids], self.tokenizer.pad_token_id)
        labels, _ = _left([torch.tensor([*answer, self.end]) for answer in answers], IGNORE)
        kinds = torch.tensor([ASKED.index(kind) for _, _, kind, _, _ in drawn])
        page = torch.tensor([page for _, page, *_ in drawn])
        answered = torch.tensor([len(answer) for answer in answers])
        return Batch(padded, mask, labels, answered, kinds, page, layers, background)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def _draw(self, dice: Dice) -> tuple[list[Scene], int, str, str, str]:
        """Scenes, the page asked about, kind, question and answer."""
        while True:
            scenes = [sample_scene(dice) for _ in range(self.pages)]
            page, kind = dice.below(self.pages), dice.pick(ASKED if self.pages == 1 else NAMING)
            found = training_question(kind, scenes[page], dice)
            if found and (self.pages == 1 or _only_there(found, scenes, page)):
                return scenes, page, kind, *found


def _only_there(found: tuple[str, str], scenes: list[Scene], page: int) -> bool:
    """Whether the question names a class of its page, and none of another page."""
    here, text = scenes[page].classes, found[0]
    named = {cls for cls in here if OBJECTS[cls].name in text or OBJECTS[cls].plural in text}
    return bool(named) and not any(named & set(scene.classes) for i, scene in enumerate(scenes) if i != page)


def _left(rows: list[torch.Tensor], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat([row.new_full((longest - len(row),), fill), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    return padded, (torch.arange(longest) >= longest - lengths).long()


def batches(prompts: Prompts, start: int, stop: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches of the steps from `start` to `stop`, on `device`."""
    loader: Any = DataLoader(
        prompts,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        yield batch.to(device)


def model_inputs(model: Any, processor: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """What the model's forward takes: ids, mask and normalised pixels."""
    image = processor.image_processor
    mean, std = (
        torch.tensor(x, device=batch.ids.device)[:, None, None] * 255 for x in (image.image_mean, image.image_std)
    )
    raw = render(batch.layers, batch.background, load_atlas(batch.ids.device)).float()
    size = image.crop_size["height"]
    if raw.shape[-1] != size:
        raw = F.interpolate(raw, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "pixel_values": ((raw - mean) / std).to(model.dtype),
    }
