"""Fixed question sets, the same on every machine: a split is a function of its name.

Existence follows POPE (arXiv 2305.10355, section 4): per picture three classes that are present and three that are not,
the absent ones drawn at random, as the most frequent classes of the split, or as the classes that most often share a
picture with those present. ``existence-counterfactual`` asks about scenes that break the themes; its absent classes are
drawn like the adversarial ones, from the co-occurrence of the ordinary scenes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ....errors import InputError
from .catalogue import OBJECTS
from .questions import ASK, ask_existence
from .render import load_atlas, render
from .sample import Dice, Scene, sample_scene, scene_tensors

EXISTENCE_KINDS = ("existence-random", "existence-popular", "existence-adversarial", "existence-counterfactual")
KINDS = (*EXISTENCE_KINDS, *ASK)
COUNTERFACTUAL = ("existence-counterfactual", "caption-counterfactual")
"""Kinds that ask about scenes that break the themes; captions of those are in no default list, nor in `digest`."""
SPLITS = {"test": 2000, "val": 300, "confirm": 2000}  # questions per kind
CAPTIONS = {"test": 1000, "val": 200, "confirm": 1000}
"""``confirm`` is drawn like ``test``, for what was decided after a look at that."""
COUNTERFACTUAL_CAPTIONS = 1000  # of every split: settings are chosen on those of "val" by a few words more or less
STATISTICS_SCENES = 2000
SYNONYMS = {"centre": ("center", "middle", "in the centre")}
PER_PICTURE = 3  # existence: positives, and negatives, per picture


@dataclass(frozen=True)
class Question:
    """One question with its ground truth. ``source`` names the picture: questions that share it share the picture."""

    id: str
    kind: str
    text: str
    answer: str
    accepted: tuple[str, ...]
    scene: Scene
    source: str

    def image(self) -> Image.Image:
        """The picture, 336x336 RGB."""
        return picture(self.scene)


def picture(scene: Scene) -> Image.Image:
    """Render one scene on the CPU."""
    layers, background = scene_tensors([scene])
    pixels = render(layers, background, load_atlas("cpu")).squeeze(0)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def scene_at(split: str, index: int, *, counterfactual: bool = False) -> Scene:
    """Scene ``index`` of a split."""
    family = "counterfactual" if counterfactual else "scene"
    return sample_scene(Dice(f"{split}/{family}/{index}"), counterfactual=counterfactual)


@lru_cache
def statistics(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Class frequency [C] and co-occurrence [C, C] (pictures that hold both; zero diagonal) over the split's scenes."""
    present = np.zeros((STATISTICS_SCENES, len(OBJECTS)), dtype=np.int64)
    for index in range(STATISTICS_SCENES):
        present[index, list(scene_at(split, index).classes)] = 1
    together = present.T @ present
    np.fill_diagonal(together, 0)
    return present.sum(0), together


def _absent(kind: str, split: str, present: set[int], dice: Dice) -> list[int]:
    """``PER_PICTURE`` classes that the picture does not hold, as the kind defines them."""
    others = [cls for cls in range(len(OBJECTS)) if cls not in present]
    if kind == "existence-random":
        return dice.shuffled(others)[:PER_PICTURE]
    frequency, together = statistics(split)
    score = frequency if kind == "existence-popular" else together[sorted(present)].sum(0)
    return sorted(others, key=lambda cls: (-score[cls], cls))[:PER_PICTURE]


def _existence(kind: str, split: str) -> Iterator[tuple[int, str, str, Scene]]:
    index = 0
    while True:
        scene = scene_at(split, index, counterfactual=kind in COUNTERFACTUAL)
        dice, present = Dice(f"{split}/{kind}/{index}"), set(scene.classes)
        if len(present) >= PER_PICTURE:
            absent = _absent(kind, split, present, dice)
            for yes, no in zip(dice.shuffled(sorted(present)), absent, strict=False):
                yield index, *ask_existence(dice, yes, True), scene
                yield index, *ask_existence(dice, no, False), scene
        index += 1


def _other(kind: str, split: str) -> Iterator[tuple[int, str, str, Scene]]:
    index = 0
    while True:
        scene = scene_at(split, index, counterfactual=kind in COUNTERFACTUAL)
        qa = ASK[kind.removesuffix("-counterfactual")](scene, Dice(f"{split}/{kind}/{index}"))
        if qa is not None:
            yield index, *qa, scene
        index += 1


def _questions(split: str, kind: str, limit: int) -> Iterator[Question]:
    counterfactual = kind in COUNTERFACTUAL
    stream = _existence(kind, split) if kind in EXISTENCE_KINDS else _other(kind, split)
    for number, (index, text, answer, scene) in enumerate(stream):
        if number >= limit:
            return
        source = f"{split}/{'counterfactual' if counterfactual else 'scene'}/{index}"
        accepted = (answer, *SYNONYMS.get(answer, ()))
        yield Question(f"{split}/{kind}/{number}", kind, text, answer, accepted, scene, source)


def load(split: str = "test", kinds: Iterable[str] | None = None, limit: int | None = None) -> list[Question]:
    """The questions of a split, kind by kind; ``limit`` is per kind. Raises InputError for an unknown split or kind."""
    if split not in SPLITS:
        raise InputError(f"There is no split {split!r}; use one of {', '.join(SPLITS)}.")
    chosen = KINDS if kinds is None else tuple(kinds)
    for kind in chosen:
        if kind not in (*KINDS, *COUNTERFACTUAL):
            raise InputError(f"There is no question kind {kind!r}; use one of {', '.join(KINDS)}.")
    sizes = {
        **dict.fromkeys(KINDS, SPLITS[split]),
        "caption": CAPTIONS[split],
        "caption-counterfactual": COUNTERFACTUAL_CAPTIONS,
    }
    return [
        question
        for kind in chosen
        for question in _questions(split, kind, sizes[kind] if limit is None else min(limit, sizes[kind]))
    ]


@lru_cache
def digest(split: str) -> str:
    """SHA-256 of the split's questions, answers and scene graphs as canonical JSON."""
    h = hashlib.sha256()
    for q in load(split):
        record = [q.id, q.text, q.answer, q.source, q.scene.layers, q.scene.background, q.scene.word]
        h.update(json.dumps(record, separators=(",", ":")).encode())
    return h.hexdigest()
