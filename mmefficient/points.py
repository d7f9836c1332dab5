"""Extension points: `Reducer`, and from here too `layered` and what methods decide by (`decisions`, `budgets`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmefficient.budgets import Scope, Unit, at_depths, check_budget, resolve_budget
from mmefficient.decisions import (
    LayerTokens,
    MatchTokens,
    OwnHeads,
    QuestionTokens,
    Selection,
    TowerLayer,
    TowerTokens,
    VisualTokens,
    order_selection,
    select_top,
)
from mmefficient.errors import PlanError
from mmefficient.layered import EVERYTHING, LayerMethod, Layers, Pattern, RowPolicy, VisualWork
from mmefficient.method import SHARED, Method, about

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

__all__ = [
    "EVERYTHING",
    "KEYS",
    "SHARED",
    "LayerMethod",
    "LayerTokens",
    "Layers",
    "MatchTokens",
    "Method",
    "OwnHeads",
    "Pattern",
    "Positions",
    "QuestionTokens",
    "Reducer",
    "RowPolicy",
    "Scope",
    "Selection",
    "TowerLayer",
    "TowerTokens",
    "Unit",
    "VisualTokens",
    "VisualWork",
    "about",
    "at_depths",
    "check_budget",
    "order_selection",
    "resolve_budget",
    "select_top",
]

KEYS: Literal["keys"] = "keys"
"""Among the scores of a layer, the sizes of its keys."""

Positions = Literal["keep", "compact"]


@dataclass(frozen=True)
class Reducer(Method):
    """Which visual tokens exist from a site on. Identity: keep all.

    A method is a frozen dataclass that sets the class variables and overrides `score` (rank, keep the best) or `reduce`
    (anything else, such as merging). Gathering, positions, ragged batches, caches and accounting are done for it.
    """

    point: ClassVar[str] = "reducer"
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the method asks for: see `VisualTokens`; "full_grid": every view of a unit is a complete grid."""
    adaptive: ClassVar[bool] = False
    """Whether budgets depend on what the tokens hold (`choose`), at one wait for the device; may be a property."""
    weighted: ClassVar[bool] = False
    """Whether keys count by their size from the site on, also for later tokens (log of the size on their logits)."""
    shared_by: ClassVar[Scope] = "image"
    """What shares a budget, for methods without a field `scope`."""
    space: ClassVar[Literal["lm", "tower"]] = "lm"
    """Whose features `Selection.mix` mixes; tower features go through the projector afterwards."""
    ignores_hidden: ClassVar[bool] = False
    """Whether nothing that `VisualTokens.hidden` holds changes the decision, which mixes no features: then
    the rows that leave need not finish the layer before."""
    class_token: ClassVar[str] = ""
    """What stands in for the tower's CLS token where there is none; empty: the method does without one everywhere."""

    @property
    def scope(self) -> Scope:
        """What shares a budget; methods whose rule holds for any pool of tokens have a field of this name instead."""
        return self.shared_by

    @property
    def site(self) -> int:
        """Decoder layer at whose input the reducer acts; 0 = input of the language model."""
        return getattr(self, "layer", 0)

    @property
    def staged(self) -> bool:
        """Whether only `stages` knows the sites."""
        return type(self).stages is not Method.stages

    @property
    def thins(self) -> bool:
        """Whether the method makes the vision tower give fewer tokens (`attach`), so that nothing else can ask it."""
        return False

    def attach(self, adapter: Adapter) -> list[Callable[[], Any]]:
        """Change how the vision tower runs while the plan is applied (`tower.Thinning`); returns what undoes it."""
        return []

    @property
    def position_policy(self) -> Positions:
        """'keep': surviving tokens keep their position ids. 'compact': ids close up, later text included."""
        return getattr(self, "positions", "keep")

    def __post_init__(self) -> None:
        if (keep := getattr(self, "keep", None)) is not None:
            check_budget(f"{self.name}: keep", keep)
        super().__post_init__()
        if self.site < 0:
            raise PlanError(f"{self.name}: layer={self.site} is not a layer number; count from 0.")

    def raters(self, tokens: VisualTokens) -> torch.Tensor:
        """bool [U, Q]: whose attention `VisualTokens.attention` is ("question_attention"); identity: all question rows.

        Args:
            tokens: the prompt at the language model's input, one unit per row, with `question`.
        """
        assert tokens.question is not None
        return tokens.question.valid

    def budget(self, unit: Unit) -> int:
        """How many tokens of `unit` stay.

        Raises:
            BudgetError: more than the unit holds.
        """
        return resolve_budget(self.keep, unit)  # type: ignore[attr-defined]

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        """What stays of every unit, and how many; only asked of `adaptive` methods, others have `budget`."""
        raise NotImplementedError(f"{type(self).__name__} is adaptive but does not override choose")

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        """[U, N], higher stays."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither score nor reduce")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        """Choose `counts[u]` tokens of every unit u."""
        return select_top(self.score(tokens), tokens.valid, counts)
