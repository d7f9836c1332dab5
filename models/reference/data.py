"""Training batches: scenes, and per picture a fixed layout of independent question slots behind one shared prefix.

Every question of a picture sees the picture and its own slot only, at the positions it would have at inference, so one
pass over the visual tokens serves more than twenty single-turn conversations. The layout is the same for every picture
and step; that makes the attention mask a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from .build import PATCHES
from .scenes.catalogue import OBJECTS, WORDS
from .scenes.questions import QA, training_question
from .scenes.sample import Dice, Scene, sample_scene, scene_tensors
from .scenes.splits import KINDS

MAX_LAYERS = 14  # drawn layers per scene: clutter, things and a word
SINGLE, TURNS, CAPTION = 20, 40, 48  # tokens per slot: one turn, two turns, a caption
SLOTS = (SINGLE,) * 22 + (TURNS,) * 2 + (CAPTION,)
RECIPE: tuple[str, ...] = ("existence-random",) * 7 + ("count",) * 4 + ("position",) * 3 + ("relation",) * 4
RECIPE += ("two-hop", "colour", "reading", "comparison")
MIXED = ("existence-random", "count", "position", "relation", "two-hop", "colour", "reading", "comparison")
MAX_ANSWER = 96  # answer tokens per picture
MAX_POINTS = 40  # object names in questions per picture
IGNORE = -100

# dense patch labels: background, clutter, then every object sprite, then every word
SPRITE_BASE = np.cumsum([2] + [len(cls.sprites) for cls in OBJECTS])
WORD_BASE = int(SPRITE_BASE[-1])
DENSE_LABELS = WORD_BASE + len(WORDS)


@dataclass(frozen=True)
class Layout:
    """Positions of the prefix and the slots in a training sequence of ``length`` tokens."""

    prefix: int
    slots: tuple[int, ...] = SLOTS

    @cached_property
    def starts(self) -> list[int]:
        return [self.prefix + sum(self.slots[:i]) for i in range(len(self.slots))]

    @cached_property
    def length(self) -> int:
        return -(-(self.prefix + sum(self.slots)) // 128) * 128

    @cached_property
    def slot(self) -> torch.Tensor:
        """Slot number per position, int32 [length]; 0 for the prefix, slots count from 1, the tail is one more slot."""
        sizes = torch.tensor([self.prefix, *self.slots, self.length - self.prefix - sum(self.slots)])
        return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position ids, int64 [length]: every slot continues the prefix."""
        first = torch.tensor([0, *self.starts, self.starts[-1] + self.slots[-1]])
        offset = torch.arange(self.length) - first[self.slot.long()]
        return torch.where(self.slot > 0, offset + self.prefix, offset)

    def visible(self) -> torch.Tensor:
        """bool [length, length]: whether a query position sees a key position."""
        index = torch.arange(self.length)
        return visible(index[:, None], index[None], self.slot)


def visible(q: torch.Tensor, k: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Whether query position ``q`` sees key position ``k`` (broadcasting integer tensors), given `Layout.slot`."""
    return (k <= q) & ((slot[k] == 0) | (slot[k] == slot[q]))


def prefix_ids(processor: LlavaProcessor) -> list[int]:
    """Token ids of ``<s>USER: <image>\\n`` with the image token repeated for every patch."""
    tokenizer, image = processor.tokenizer, processor.image_token
    return tokenizer(f"USER: {image * PATCHES}\n").input_ids


class Batches(Dataset[dict[str, torch.Tensor]]):
    """``self[step]`` is the batch of that step: a function of the seed and the step, whichever worker makes it.

    With ``single``, a picture gets one question instead of one per slot.
    """

    def __init__(
        self, processor: LlavaProcessor, batch_size: int, seed: int, *, text: bool = True, single: bool = False
    ) -> None:
        self.tokenizer = processor.tokenizer
        self.prefix = prefix_ids(processor)
        self.layout = Layout(len(self.prefix), (CAPTION,) if single else SLOTS)
        self.single = single
        self.batch_size, self.seed, self.text = batch_size, seed, text
        self.names = {}
        for index, cls in enumerate(OBJECTS):
            for form in {cls.name, cls.plural}:
                self.names[tuple(self._ids(f" {form}"))] = index

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        scenes = [self._scene(Dice(f"train/{self.seed}/{step}/{i}")) for i in range(self.batch_size)]
        layers, background = scene_tensors(scenes, MAX_LAYERS)
        batch = {"layers": layers, "background": background} | _labels(scenes)
        if self.text:
            dice = [Dice(f"questions/{self.seed}/{step}/{i}") for i in range(self.batch_size)]
            batch |= self._text(scenes, dice)
        return {name: torch.as_tensor(value) for name, value in batch.items()}

    def _scene(self, dice: Dice) -> Scene:
        return sample_scene(dice)

    def _question(self, kind: str, scene: Scene, dice: Dice) -> QA | None:
        return training_question(kind, scene, dice)

    def _conversations(self, scene: Scene, dice: Dice) -> list[list[tuple[str, tuple[str, str]]]]:
        """One list of (kind, (question, answer)) turns per slot."""
        turns = [[kind] for kind in RECIPE] + [[dice.pick(MIXED), dice.pick(MIXED)] for _ in range(2)] + [["caption"]]
        if self.single:
            turns = [[dice.pick((*RECIPE, "caption"))]]
        out = []
        for kinds in turns:
            asked = [(kind, self._question(kind, scene, dice)) for kind in kinds]
            fallback = [("existence-random", training_question("existence-random", scene, dice)) for _ in kinds]
            filled = [a if a[1] else b for a, b in zip(asked, fallback, strict=True)]
            out.append([(kind, qa) for kind, qa in filled if qa])
        return out

    def _text(self, scenes: list[Scene], dice: list[Dice]) -> dict[str, np.ndarray]:
        n, layout, tokenizer = len(scenes), self.layout, self.tokenizer
        conversations = [self._conversations(scene, d) for scene, d in zip(scenes, dice, strict=True)]
        flat = [
            (row, slot, number, kind, qa)
            for row, slots in enumerate(conversations)
            for slot, turns in enumerate(slots)
            for number, (kind, qa) in enumerate(turns)
        ]
        asked = [("USER: " if number else "") + f"{qa[0]} ASSISTANT:" for _, _, number, _, qa in flat]
        questions = tokenizer(asked, add_special_tokens=False).input_ids
        answers = tokenizer([f" {qa[1]}" for *_, qa in flat], add_special_tokens=False).input_ids
        tokens = np.full((n, layout.length), tokenizer.pad_token_id, dtype=np.int64)
        tokens[:, : len(self.prefix)] = self.prefix
        rows = np.zeros((n, MAX_ANSWER), dtype=np.int64)
        labels = np.full((n, MAX_ANSWER), IGNORE, dtype=np.int64)
        kinds = np.zeros((n, MAX_ANSWER), dtype=np.int64)  # 1 + index into KINDS
        turn = np.zeros((n, MAX_ANSWER), dtype=np.int64)  # which question of the picture the answer token belongs to
        points = np.zeros((n, MAX_POINTS), dtype=np.int64)
        classes = np.full((n, MAX_POINTS), IGNORE, dtype=np.int64)
        used = np.zeros((n, 3), dtype=np.int64)  # answer tokens, points, turns so far
        filled: dict[tuple[int, int], int] = {}
        for (row, slot, _, kind, _), question, answer in zip(flat, questions, answers, strict=True):
            begin = filled.get((row, slot), 0)
            ids = [*question, *answer, tokenizer.eos_token_id]
            a, p, t = used[row]
            count = len(answer) + 1
            if begin + len(ids) > layout.slots[slot] or a + count > MAX_ANSWER:
                continue
            start = layout.starts[slot] + begin
            tokens[row, start : start + len(ids)] = ids
            rows[row, a : a + count] = start + len(question) - 1 + np.arange(count)
            labels[row, a : a + count] = ids[len(question) :]
            kinds[row, a : a + count] = 1 + KINDS.index(kind)
            turn[row, a : a + count] = t
            for last, cls in self._mentions(question):
                if p < MAX_POINTS:
                    points[row, p], classes[row, p] = start + last, cls
                    p += 1
            used[row] = a + count, p, t + 1
            filled[row, slot] = begin + len(ids)
        return {
            "tokens": tokens,
            "rows": rows,
            "labels": labels,
            "kinds": kinds,
            "turn": turn,
            "points": points,
            "point_classes": classes,
        }

    def _mentions(self, ids: list[int]) -> list[tuple[int, int]]:
        """(index of the last token, class) of every object name in a question, longest names first."""
        found, i = [], 0
        while i < len(ids):
            for length in (3, 2, 1):
                cls = self.names.get(tuple(ids[i : i + length]))
                if cls is not None and i + length <= len(ids):
                    found.append((i + length - 1, cls))
                    i += length - 1
                    break
            i += 1
        return found


def _labels(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Ground truth per drawn layer: dense label, class (or IGNORE) [B, K] and centre in pixels [B, K, 2]."""
    n = len(scenes)
    dense = np.zeros((n, MAX_LAYERS), dtype=np.int64)
    cls = np.full((n, MAX_LAYERS), IGNORE, dtype=np.int64)
    centre = np.zeros((n, MAX_LAYERS, 2), dtype=np.float32)
    present = np.zeros((n, len(OBJECTS)), dtype=np.float32)
    for row, scene in enumerate(scenes):
        clutter = len(scene.layers) - len(scene.things) - (scene.word is not None)
        dense[row, :clutter] = 1
        for i, thing in enumerate(scene.things, start=clutter):
            dense[row, i] = SPRITE_BASE[thing.cls] + thing.variant
            cls[row, i] = thing.cls
            centre[row, i] = thing.centre
            present[row, thing.cls] = 1
        if scene.word is not None:
            dense[row, len(scene.layers) - 1] = WORD_BASE + WORDS.index(scene.word)
    return {"dense": dense, "cls": cls, "centre": centre, "present": present}
