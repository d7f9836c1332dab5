"""What a matcher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

EMBEDDINGS, WORDS = "embeddings", "words"
OWN = frozenset({EMBEDDINGS, WORDS})
"""Matchers that need none: image and text tokens at the language model's input are in one space already. A patch is
compared with the question's tokens as a whole, or with the one that it goes with best: see `MatchTokens.embedded`."""


@dataclass(frozen=True)
class Seen:
    """What the vision tower was given and gave.

    Attributes:
        tower: the vision tower.
        pixels: its input, [crops, 3, H, W].
        mean, std: what the model's processor normalised the pixels with, per channel.
        features: input of the projector, [crops, T, Dv], without a CLS token.
    """

    tower: nn.Module
    pixels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    features: torch.Tensor


class Matcher(ABC):
    """Puts patches and texts into one space of E numbers, in which a dot product says how well they match.

    Attributes:
        inverted: small products mean a good match. So it is with patch states of CLIP: what matches the whole caption
            gathers in patches of the background.
    """

    inverted: bool = True

    @abstractmethod
    def patches(self, seen: Seen) -> torch.Tensor:
        """float32 [crops, T, E], not normalised.

        Raises:
            ModelError: the tower does not fit the matcher.
        """

    @abstractmethod
    def texts(self, questions: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The questions, each in pieces that the text encoder can read; an empty one is one piece.

        Returns:
            float32 [B, C, E], not normalised, and which pieces are used, bool [B, C]; both on `device`.
        """


class Looker(ABC):
    """Says where in a picture a question looks, from both together."""

    @abstractmethod
    def look(
        self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], questions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Relevance of patches, and how well a question goes with its picture.

        Args:
            pixels: [N, 3, H, W], normalised with `mean` and `std`; questions: one per picture.

        Returns:
            float32 [N, T], T patches in a square grid, larger where the question looks; cosines, float32 [N].
        """


def pieces(tokens: Sequence[Sequence[int]], length: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut token lists into pieces of at most `length`, each between `start` and `end`, filled up with zeros.

    Returns:
        int64 [B, C, length], and which pieces are used, bool [B, C].
    """
    room = length - 2
    cut = [[list(one[at : at + room]) for at in range(0, len(one), room)] or [[]] for one in tokens]
    most = max(len(each) for each in cut)
    ids = torch.zeros(len(cut), most, length, dtype=torch.long)
    used = torch.zeros(len(cut), most, dtype=torch.bool)
    for row, each in enumerate(cut):
        for place, piece in enumerate(each):
            framed = [start, *piece, end]
            ids[row, place, : len(framed)] = torch.tensor(framed)
            used[row, place] = True
    return ids, used
