"""URaG (Shi et al., AAAI 2026): after a few layers, whole images that do not matter to the question leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.points import Reducer, Selection, Unit, VisualTokens, about, order_selection, resolve_budget
from mmefficient.profiles import Checkpoint, Profile


@dataclass(frozen=True)
class URaG(Reducer):
    """Images (pages) are ranked by late interaction with the question; the best of every prompt stay whole."""

    name: ClassVar[str] = "urag"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.10552"
    summary: ClassVar[str] = "keep the whole images (pages) that matter to the question"
    many_turns: ClassVar[bool] = False

    keep: float | int = field(
        default=5, metadata=about("images that stay, per prompt: a fraction in (0, 1] or a count")
    )
    layer: int = field(default=6, metadata=about("decoder layer at whose input images leave; a head brings its own"))
    head: str = field(
        default="none",
        metadata=about("trained head: none = by question attention, auto = the checkpoint's profile, or a path"),
    )

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        if self.head == "none":
            return (_ByAttention(self.keep, self.layer),)
        profile = checkpoint.profile(self.name, self.head)
        return (_ByHead(self.keep, profile.facts["layer"], str(profile.path)),)


@dataclass(frozen=True)
class _Pages(Reducer):
    name: ClassVar[str] = "urag"
    adaptive: ClassVar[bool] = True

    keep: float | int
    layer: int

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        rows: dict[int, list[int]] = {}
        for place, unit in enumerate(tokens.units):
            if unit.count:
                rows.setdefault(unit.row, []).append(place)
        limits = {row: self.limit(len(pages), row) for row, pages in rows.items()}
        counts = [unit.count for unit in tokens.units]
        if any(limits[row] < len(pages) for row, pages in rows.items()):
            scores = self.score(tokens).tolist()
            for row, pages in rows.items():
                for place in sorted(pages, key=lambda place: -scores[place])[limits[row] :]:
                    counts[place] = 0
        everything = torch.arange(tokens.valid.shape[1], device=tokens.valid.device).expand_as(tokens.valid)
        return order_selection(everything, counts), counts

    def limit(self, pages: int, row: int) -> int:
        """Pages of a row that stay."""
        return min(
            pages, resolve_budget(self.keep, Unit(row, "the prompt", 0, pages, ())) if self.keep <= pages else pages
        )


@dataclass(frozen=True)
class _ByAttention(_Pages):
    """A page's score is the attention that the question pays to it in the layer before."""

    needs: ClassVar[frozenset[str]] = frozenset({"question_attention"})

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention.masked_fill(~tokens.valid, 0.0).sum(1)


@dataclass(frozen=True)
class _ByHead(_Pages):
    """A page's score is the sum over question tokens of their best match on the page, in a learned space."""

    needs: ClassVar[frozenset[str]] = frozenset({"question"})

    head: str

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.question is not None
        weights = _weights(self.head, tokens.hidden.device, tokens.hidden.dtype)
        return late_interaction(
            embed(tokens.question.hidden, weights), tokens.question.valid, embed(tokens.hidden, weights), tokens.valid
        )


def embed(hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """L2norm(W2 GELU(W1 h)), with biases, float32 [..., d]."""
    inner = F.gelu(F.linear(hidden, weights["inner"], weights["inner_bias"]))
    return F.normalize(F.linear(inner, weights["outer"], weights["outer_bias"]).float(), dim=-1)


def late_interaction(
    question: torch.Tensor, question_valid: torch.Tensor, page: torch.Tensor, page_valid: torch.Tensor
) -> torch.Tensor:
    """Sum over question tokens of the largest product with a token of the page (ColBERT's MaxSim), float32 [U].

    Args:
        question: [U, Q, d]; page: [U, N, d]; the others: bool, which of them count.
    """
    likeness = (question @ page.transpose(1, 2)).masked_fill(~page_valid[:, None], float("-inf"))
    return likeness.amax(2).masked_fill(~question_valid, 0.0).sum(1)


@lru_cache(maxsize=8)
def _weights(path: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return Profile.read(path).tensors(device, dtype)
