"""Sentence-level preference pairs, bootstrapped from scenes: what a model says next, verified against the truth.

After SENTINEL (Peng et al., ICCV 2025, arXiv 2507.12455), section 3. Captions here are one sentence, so the unit is a
phrase with the mark before it: "a dog | , two cats | and a bus | .". From every context several next units are sampled.
One that names an object with its number, both right and not yet named, is factual; one that names an object that is not
there is hallucinated; whatever else is uncertain, and ignored. Factual and hallucinated units make pairs, and the
context grows by a factual one until the caption ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from mmefficient.forks import Stored, padded
from mmefficient.sentences import PHRASES, Units

from .data import prefix_ids
from .scenes.catalogue import OBJECTS
from .scenes.questions import CAPTION, NUMBERS
from .scenes.render import Atlas, render
from .scenes.sample import Dice, Scene, sample_scene, scene_tensors

NEW_TOKENS = 9  # the longest phrase, and the mark after it


@dataclass(frozen=True)
class Pair:
    """Two ways to go on from `context`; all but `scene` (its number) and `question` are token ids."""

    scene: int
    question: str
    context: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Pair:
        """The inverse of `asdict`, also after JSON."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        return cls(**fields)


@cache
def scene_of(seed: int, index: int) -> Scene:
    """Training scene `index`; half of them break the themes."""
    dice = Dice(f"sentinel/{seed}/{index}")
    return sample_scene(dice, counterfactual=dice.chance(0.5))


@lru_cache
def phrases() -> dict[str, tuple[int, int]]:
    """Every phrase of captions, and the class and number it states."""
    found = {}
    for index, cls in enumerate(OBJECTS):
        found[cls.indefinite] = index, 1
        found |= {f"{word} {cls.plural}": (index, n) for n, word in enumerate(NUMBERS) if n > 1}
    return found


def stated(text: str) -> tuple[int, int] | None:
    """The class and the number that a unit states, if it is a phrase of captions."""
    text = text.strip()
    mark = next((mark for mark in PHRASES if text.startswith(f"{mark} ")), "")
    return phrases().get(text.removeprefix(mark).strip())


def verdict(text: str, said: Collection[int], scene: Scene) -> bool | None:
    """Whether a unit is factual (True) or hallucinated (False) after the classes in `said`; None is uncertain.

    A full stop is factual where every object of the scene has been named: a truth that detectors do not give, and
    without which no pair would teach a caption to end.
    """
    if text.strip() == ".":
        return True if set(said) == set(scene.classes) else None
    found = stated(text)
    if found is None:
        return None
    cls, number = found
    if cls not in scene.classes:
        return False
    return True if cls not in said and len(scene.classes[cls]) == number else None


class Bootstrap:
    """Samples units from a model and verifies them.

    Args:
        model: stock, in evaluation mode; samples: units per context; temperature: they are drawn at.
    """

    def __init__(
        self, model: Any, processor: LlavaProcessor, atlas: Atlas, seed: int, samples: int, temperature: float
    ) -> None:
        self.model, self.tokenizer, self.atlas, self.seed = model, processor.tokenizer, atlas, seed
        self.samples, self.temperature = samples, temperature
        self.prefix, self.units = prefix_ids(processor), Units(processor.tokenizer)
        image = processor.image_processor
        self.mean, self.std = (
            torch.tensor(values, device=model.device).view(1, 3, 1, 1) * 255
            for values in (image.image_mean, image.image_std)
        )

    @torch.no_grad()
    def pairs(self, indices: Sequence[int]) -> list[Pair]:
        """Pairs from these scenes, a function of the seed and of `indices`."""
        torch.manual_seed(self.seed * 1_000_003 + indices[0])
        scenes = [scene_of(self.seed, index) for index in indices]
        asked = [Dice(f"sentinel/{self.seed}/{index}/question").pick(CAPTION) for index in indices]
        stored, following = Stored.of(self.model, self._prompts(scenes, asked))
        contexts: list[tuple[int, ...]] = [() for _ in indices]
        said: list[list[int]] = [[] for _ in indices]
        live, found = [row for row, scene in enumerate(scenes) if scene.classes], []
        while live:
            drawn = self._sample(stored, following, torch.tensor(live, device=following.device))
            grown: dict[int, tuple[int, ...]] = {}
            for row, units in zip(live, drawn, strict=True):
                judged = {unit: verdict(self.tokenizer.decode(unit), said[row], scenes[row]) for unit in units}
                factual = [unit for unit in units if judged[unit] is True]
                for good, bad in zip(factual, (u for u in units if judged[u] is False), strict=False):
                    found.append(Pair(indices[row], asked[row], contexts[row], good, bad))
                named = stated(self.tokenizer.decode(factual[0])) if factual else None
                if named is not None:
                    grown[row] = factual[0]
                    contexts[row] += factual[0]
                    said[row].append(named[0])
            live = list(grown)
            if live:
                ids, used = padded([grown.get(row, ()) for row in range(len(indices))], following.device)
                logits, at = stored.read(ids, used), torch.tensor(live, device=following.device)
                following[at] = logits[at, used[at].sum(1) - 1]
        return found

    def _prompts(self, scenes: Sequence[Scene], asked: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs, padded on the left."""
        device = self.model.device
        layers, background = scene_tensors(scenes)
        raw = render(layers.to(device), background.to(device), self.atlas)
        questions = self.tokenizer([f"{each} ASSISTANT:" for each in asked], add_special_tokens=False).input_ids
        longest = max(map(len, questions))
        ids = [[self.tokenizer.pad_token_id] * (longest - len(q)) + self.prefix + q for q in questions]
        mask = [[0] * (longest - len(q)) + [1] * (len(self.prefix) + len(q)) for q in questions]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "pixel_values": ((raw.float() - self.mean) / self.std).to(self.model.dtype),
        }

    def _sample(self, stored: Stored, following: Tensor, rows: Tensor) -> list[list[tuple[int, ...]]]:
        """Of each of these rows its different next units, the most frequent first."""
        many = rows.repeat_interleave(self.samples)
        fork, logits, new = stored.fork(many), following[many], torch.empty(len(many), 0, dtype=torch.long)
        for _ in range(NEW_TOKENS):
            known = logits[:, : len(self.units.begins)]  # a vocabulary may be larger than its tokenizer
            token = (known / self.temperature).softmax(-1).multinomial(1)
            new = torch.cat([new, token.cpu()], 1)
            if bool(self.units.begins[new[:, 1:]].any(1).all()):
                break
            logits = fork.read(token, torch.ones_like(token, dtype=torch.bool))[:, -1]
        drawn = []
        for group in new.view(len(rows), self.samples, -1).tolist():
            ends = [(ids, self.units.first(ids)) for ids in group]
            counted = Counter(tuple(ids[:end]) for ids, end in ends if end is not None)
            drawn.append([unit for unit, _ in sorted(counted.items(), key=lambda one: (-one[1], one[0]))])
        return drawn
