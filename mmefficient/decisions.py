"""What a reducer decides by, and what it says: visual tokens packed by unit, and a selection of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional as F

from mmefficient.budgets import Unit
from mmefficient.matchers.base import WORDS


@dataclass(frozen=True)
class TowerLayer:
    """A layer of the vision tower to look into.

    Attributes:
        layer: number from 0, or from the end if negative; a float is a share of the tower's layers (0.375 of 24 is the
            ninth, number 8); None = the layer whose output the projector reads.
        rows: who asks: the CLS row (if the tower has one, else all rows), or all rows.
        joined: count all heads as one; then attention is that of one wide head, and keys hold all channels.
    """

    layer: int | float | None = None
    rows: Literal["class", "all"] = "class"
    joined: bool = False


@dataclass(frozen=True)
class LayerTokens:
    """What one tower layer knows about the visual tokens.

    Attributes:
        attention: float32 [U, N]: attention a patch receives, mean over the asking rows and over heads.
        keys: mean over heads, or all channels of them, [U, N, d].
    """

    attention: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class TowerTokens:
    """What the vision tower knows about the visual tokens; [U, N, ...] like `VisualTokens`.

    Attributes:
        features: input of the projector, [U, N, Dv].
        attention: float32 [U, N]: attention a patch receives in the layer whose output is `features`, mean over heads:
            from the CLS row if the tower has one, else mean over all rows.
        keys: keys of that layer, mean over heads, [U, N, d].
        layers: the layers in `Reducer.tower_layers`.
    """

    features: torch.Tensor
    attention: torch.Tensor
    keys: torch.Tensor
    layers: Mapping[TowerLayer, LayerTokens] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionTokens:
    """The text after the last visual token of each unit's row: Q = the longest of them.

    Attributes:
        hidden: residual stream, [U, Q, D].
        valid: bool [U, Q]; False in the unused tail. The last valid one is the prompt's last token.
        key_norm: as in `VisualTokens`.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class OwnHeads:
    """Queries and keys of the visual tokens in the layer that they are about to enter.

    Attributes:
        query: before rotation, [U, H, N, d]; key: likewise, [U, G, N, d]; rotated: keys after rotation, [U, G, N, d].
    """

    query: torch.Tensor
    key: torch.Tensor
    rotated: torch.Tensor


@dataclass(frozen=True)
class MatchTokens:
    """Visual tokens and questions in one space, as a matcher sees them.

    Attributes:
        patches: float32 [U, N, E], not normalised.
        texts: float32 [U, C, E], not normalised: the question in as many pieces as the matcher reads it in.
        valid: bool [U, C]; False where a question has fewer pieces than others.
        inverted: small products mean a good match (see `matchers.Matcher`).
        words: the pieces are single words, most of which name nothing that can be seen.
    """

    patches: torch.Tensor
    texts: torch.Tensor
    valid: torch.Tensor
    inverted: bool
    words: bool = False

    @classmethod
    def embedded(cls, matcher: str, patches: torch.Tensor, words: torch.Tensor, valid: torch.Tensor) -> MatchTokens:
        """Tokens at the language model's input, as one of `matchers.OWN` compares them (docs/matchers.md).

        "words": one by one, patches with length 1, for their lengths say nothing there. "embeddings": the mean over all
        words, inverted as CLIP's is: what resembles a whole question a little is background.

        Args:
            patches: [U, N, D]; words: [U, C, D]; valid: bool [U, C], which of the words there are.
        """
        if matcher == WORDS:
            return cls(F.normalize(patches.float(), dim=-1), words.float(), valid, inverted=False, words=True)
        return cls(patches.float(), words.float(), valid, inverted=True)

    def relevance(self, lengths: bool = False) -> torch.Tensor:
        """float32 [U, N]: how well every patch goes with the question.

        It is the mean of its cosines with the pieces, negated where the matcher is inverted; with words the largest,
        for a patch shows what one word names.

        Args:
            lengths: patches count with the length they have: products with pieces of length 1.
        """
        patches = self.patches if lengths else F.normalize(self.patches, dim=-1)
        products = patches @ F.normalize(self.texts, dim=-1).transpose(1, 2)
        signed = -products if self.inverted else products
        if self.words:
            best = signed.masked_fill(~self.valid[:, None], float("-inf")).amax(2)
            return best.masked_fill(~self.valid.any(1, keepdim=True), 0.0)
        mean = signed.masked_fill(~self.valid[:, None], 0.0).sum(2)
        return mean / self.valid.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens at a reducer's site, packed by unit: U units, N = the most tokens any of them holds.

    Attributes:
        units: the U units.
        hidden: residual stream entering the layer, [U, N, D]; for methods with "final_norm" in `Reducer.needs` as the
            decoder's last norm sees it, the question's likewise.
        valid: bool [U, N]; False in the unused tail of a short unit. Other tensors hold arbitrary numbers there.
        size: float32 [U, N], original tokens each one stands for.
        attention: float32 [U, N] or None: probability each token receives, mean over heads. `Reducer.needs` says from
            whom: "last_row_attention", the last prompt row in the previous layer; "own_row_attention", the same row in
            the layer about to be entered; "question_attention", the question rows that `Reducer.raters` chose in the
            previous layer, mean over them.
        tower, question, own, match: present when "tower", "question", "own_heads", "match" is in `Reducer.needs`.
        key_norm: float32 [U, N] or None: sum of the absolute values of a token's (rotated) keys in the previous layer,
            over all heads. Present when "key_norm" is in `Reducer.needs`.
        mark: bool [U, N] or None: present when "mark" is in `Reducer.needs`: the places at which a tower that gives
            fewer tokens (`Reducer.attach`) has put them; other places hold zeros.
    """

    units: tuple[Unit, ...]
    hidden: torch.Tensor
    valid: torch.Tensor
    size: torch.Tensor
    attention: torch.Tensor | None = None
    tower: TowerTokens | None = None
    question: QuestionTokens | None = None
    own: OwnHeads | None = None
    match: MatchTokens | None = None
    mark: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """A reducer's decision: K = the most tokens any unit keeps.

    Attributes:
        index: int64 [U, K], ascending places in the packed axis; a new token takes the position of its index.
        valid: bool [U, K], False in the unused tail of a short unit.
        mix: [U, K, N] or None. New token k gets the features mix[k] @ features; None = features of its index.
    """

    index: torch.Tensor
    valid: torch.Tensor
    mix: torch.Tensor | None = None


def select_top(scores: torch.Tensor, valid: torch.Tensor, counts: Sequence[int]) -> Selection:
    """The `counts[u]` highest scores of every unit, in prompt order; ties go to the earlier token.

    Args:
        scores: [U, N]; valid: bool [U, N]; counts: U counts, none larger than the unit.
    """
    ranked = scores.float().masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return order_selection(ranked, counts)


def order_selection(ranked: torch.Tensor, counts: Sequence[int]) -> Selection:
    """The first `counts[u]` entries of every row of `ranked` [U, >= max(counts)], put into prompt order."""
    most = max(counts)
    wanted = torch.tensor(counts, device=ranked.device)[:, None]
    used = torch.arange(most, device=ranked.device) < wanted
    index = ranked[:, :most].masked_fill(~used, torch.iinfo(torch.long).max).sort(dim=1).values
    return Selection(index.masked_fill(~used, 0), used)
