"""Scene graphs: which objects a picture holds, where they are, and what is printed on it.

Scenes follow a strong co-occurrence prior: objects come in themes (a kitchen holds cups and bread), and the background
follows the theme too. ``counterfactual`` scenes break both. Every draw uses `random.Random.random` alone, the one
generator method whose sequence Python promises to keep, so a seed gives the same scene on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .catalogue import CLUTTER, OBJECTS, THEMES, WORDS, ObjectClass
from .render import BACKGROUNDS, CANVAS, EMPTY, SIZES, STYLES, WORD_HEIGHTS, load_keys

T = TypeVar("T")

THEME_SHARE = 0.88  # probability that an object is drawn from the scene's theme
MAX_HIDDEN = 0.35  # largest share of an object's box that later boxes may cover
MAX_COUNT = 6  # most instances of one class
MAX_OBJECTS = 10


class Dice:
    """Random draws that depend on ``seed`` alone, on every platform and Python version."""

    def __init__(self, seed: str | int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def weighted(self, cumulative: Sequence[float]) -> int:
        """An index drawn in proportion to weights given as a running sum."""
        point, index = self.random() * cumulative[-1], 0
        while cumulative[index] <= point:
            index += 1
        return index

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


@dataclass(frozen=True)
class Thing:
    """One object of a scene. ``x, y, w, h`` is its box in pixels (it may hang over the border by a few)."""

    cls: int  # index into OBJECTS
    variant: int  # index into the class's sprites (and colours)
    key: int  # row of the atlas tables
    x: int
    y: int
    w: int
    h: int

    @property
    def name(self) -> str:
        return OBJECTS[self.cls].name

    @property
    def colour(self) -> str | None:
        colours = OBJECTS[self.cls].colours
        return colours[self.variant] if colours else None

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.w / 2, self.y + self.h / 2


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture; ``layers`` are drawn in order over ``background`` (see `render`)."""

    things: tuple[Thing, ...]
    word: str | None
    layers: tuple[tuple[int, int, int], ...]  # (atlas key, x0, y0): clutter, then things, then the word
    background: tuple[int, ...]
    theme: str

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of all objects, repeats included."""
        return tuple(thing.name for thing in self.things)

    @property
    def classes(self) -> dict[int, list[Thing]]:
        """Objects by class index, in drawing order."""
        groups: dict[int, list[Thing]] = {}
        for thing in self.things:
            groups.setdefault(thing.cls, []).append(thing)
        return groups


@lru_cache
def theme_members(theme: str) -> tuple[list[int], list[float]]:
    """Class indices of a theme and the running sum of their Zipf weights: the first ones are its usual guests."""
    members = [i for i, cls in enumerate(OBJECTS) if theme in cls.themes]
    total, cumulative = 0.0, []
    for rank in range(len(members)):
        total += 1 / (rank + 1) ** 0.6
        cumulative.append(total)
    return members, cumulative


def _draw_classes(dice: Dice, theme: str | None, n: int) -> list[int]:
    """``n`` different classes: mostly the theme's, or (no theme) uniform over the catalogue."""
    chosen: list[int] = []
    while len(chosen) < n:
        if theme is not None and dice.chance(THEME_SHARE):
            members, cumulative = theme_members(theme)
            cls = members[dice.weighted(cumulative)]
        else:
            cls = dice.below(len(OBJECTS))
        if cls not in chosen and not any(confusable(OBJECTS[cls], OBJECTS[other]) for other in chosen):
            chosen.append(cls)
        elif dice.chance(0.2):  # a short theme may be exhausted
            theme = None
    return chosen


def confusable(a: ObjectClass, b: ObjectClass) -> bool:
    """Whether one name is a word of the other ("dog", "hot dog"): such a pair never shares a scene."""
    return a.name in b.name.split() or b.name in a.name.split()


Box = tuple[int, int, int, int]


def _overlap(a: Box, b: Box) -> int:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def _place(dice: Dice, w: int, h: int, boxes: list[Box], hidden: list[float], overhang: float) -> Box | None:
    """A free spot for a w x h box, or None after 12 tries; updates how much of the earlier boxes is hidden."""
    ox, oy = int(w * overhang), int(h * overhang)
    for _ in range(12):
        box = (dice.between(-ox, CANVAS - w + ox), dice.between(-oy, CANVAS - h + oy), w, h)
        covered = [_overlap(box, other) / (other[2] * other[3]) for other in boxes]
        # a small box over a big one must stay visible against it, and must not be swallowed by its outline
        mutual = [share * other[2] * other[3] / (w * h) for share, other in zip(covered, boxes, strict=True)]
        if (
            all(share + old <= MAX_HIDDEN for share, old in zip(covered, hidden, strict=True))
            and max(mutual, default=0) <= 2 * MAX_HIDDEN
        ):
            hidden[:] = [share + old for share, old in zip(covered, hidden, strict=True)]
            boxes.append(box)
            hidden.append(0.0)
            return box
    return None


def _background(dice: Dice, theme: str) -> tuple[int, ...]:
    """A background for `render`: its colours lean to a hue that belongs to the theme."""
    base = Dice(f"palette/{theme}")
    anchor = [base.between(90, 235) for _ in range(3)]
    a, b = ([min(255, max(0, c + dice.between(-40, 40))) for c in anchor] for _ in range(2))
    return (dice.below(len(BACKGROUNDS)), *a, *b, dice.between(8, 80) + 256 * dice.below(4096))


def sample_scene(dice: Dice, *, counterfactual: bool = False) -> Scene:
    """Draw a scene of 1 to 10 objects; ``counterfactual`` ignores themes for objects and background alike."""
    keys = load_keys()
    width, height = keys.widths, keys.heights
    theme = dice.pick(THEMES)
    classes = _draw_classes(dice, None if counterfactual else theme, dice.between(1, 6))
    counts = [1 + (dice.chance(0.2)) for _ in classes]
    if dice.chance(0.55):
        counts[dice.below(len(counts))] = dice.between(2, MAX_COUNT)
    wanted = [cls for cls, n in zip(classes, counts, strict=True) for _ in range(n)]
    if len(wanted) > MAX_OBJECTS:
        wanted = dice.shuffled(wanted)[:MAX_OBJECTS]
    top = len(SIZES) - 1 - max(0, len(wanted) - 4)  # crowded pictures hold smaller objects
    boxes: list[Box] = []
    hidden: list[float] = []
    layers: list[tuple[int, int, int]] = []
    for _ in range(dice.between(0, 3)):
        key = keys.sprite_key(dice.pick(CLUTTER), dice.below(len(SIZES) // 2))
        layers.append((key, dice.below(CANVAS - int(width[key])), dice.below(CANVAS - int(height[key]))))
    things: list[Thing] = []
    variants = {cls: dice.below(len(OBJECTS[cls].sprites)) for cls in classes}
    # big ones first: they are the hardest to place and belong behind
    for size, cls in sorted(((dice.below(top + 1), cls) for cls in dice.shuffled(wanted)), key=lambda p: -p[0]):
        variant = variants[cls]
        key = keys.sprite_key(OBJECTS[cls].sprites[variant], size)
        box = _place(dice, int(width[key]), int(height[key]), boxes, hidden, overhang=0.1)
        if box is not None:
            things.append(Thing(cls, variant, key, *box))
            layers.append((key, box[0], box[1]))
    word = None
    if dice.chance(0.5):
        index = dice.below(len(WORDS))
        key = keys.word_key(index, dice.below(len(WORD_HEIGHTS)), dice.below(len(STYLES)))
        box = _place(dice, int(width[key]), int(height[key]), boxes, hidden, overhang=0.0)
        if box is not None:
            word = WORDS[index]
            layers.append((key, box[0], box[1]))
    ground = dice.pick(THEMES) if counterfactual else theme
    return Scene(tuple(things), word, tuple(layers), _background(dice, ground), ground)


def scene_tensors(scenes: Sequence[Scene], max_layers: int | None = None) -> tuple[Tensor, Tensor]:
    """Arguments of `render`: layers int32 [B, K, 3], padded with empty ones, and background int32 [B, 8]."""
    size = max((len(scene.layers) for scene in scenes), default=0) if max_layers is None else max_layers
    empty = (EMPTY, 0, 0)
    layers = [[*scene.layers, *[empty] * (size - len(scene.layers))] for scene in scenes]
    backgrounds = [scene.background for scene in scenes]
    return torch.tensor(layers, dtype=torch.int32), torch.tensor(backgrounds, dtype=torch.int32)
