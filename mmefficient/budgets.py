"""How many visual tokens stay, and of what: budgets and the units that they apply to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmefficient.errors import BudgetError, PlanError

Scope = Literal["image", "tile", "frame", "prompt"]
"""What shares a budget: a picture or video, a crop of a picture (its overview is one too) or frame of a video, a frame
of a video alone (pictures stay whole), or a row's whole prompt."""


def check_budget(name: str, keep: float | int, least: int = 1) -> None:
    """A float is a fraction in (0, 1], an int a count of at least `least`.

    Raises:
        BudgetError: anything else.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(f"{name}={keep!r} is not a number; give a fraction such as 0.25 or a count such as 144.")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise BudgetError(f"{name}={keep} is outside (0, 1]; give a fraction such as 0.25 or a count such as 144.")
    if isinstance(keep, int) and keep < least:
        raise BudgetError(f"{name}={keep} keeps too little; give a fraction in (0, 1] or a count of at least {least}.")


def resolve_budget(keep: float | int, unit: Unit) -> int:
    """Tokens that `keep` grants to `unit`: a fraction is rounded to the nearest count, at least 1.

    Raises:
        BudgetError: a count larger than the unit; names the row.
    """
    if isinstance(keep, float):
        return max(1, int(keep * unit.count + 0.5))
    if keep > unit.count:
        raise BudgetError(f"row {unit.row} has {unit.count} visual tokens in {unit.label} but {keep} are to be kept.")
    return keep


@dataclass(frozen=True)
class Unit:
    """One pool of visual tokens that a budget applies to.

    Attributes:
        row: row of the batch.
        label: what the unit is, for messages ("image 0", "the prompt", "tile 2 of image 0").
        ordinal: number of the unit within its row.
        count: visual tokens in it now; total: in the prompt as it came.
        grids: (rows, cols) of every view in it, in prompt order; empty unless every view is a complete grid.
    """

    row: int
    label: str
    ordinal: int
    count: int
    grids: tuple[tuple[int, int], ...]
    total: int = -1

    def __post_init__(self) -> None:
        if self.total < 0:
            object.__setattr__(self, "total", self.count)


def at_depths(name: str, given: Sequence[int], depths: Sequence[float], layers: int) -> tuple[int, ...]:
    """The layers `given`, or, if none are, published `depths` (shares of the model) as layers, each above the last.

    Raises:
        PlanError: not as many as there are depths, or not in rising order.
    """
    if given:
        if len(given) != len(depths) or sorted(set(given)) != list(given):
            raise PlanError(f"{name}: layers={tuple(given)} are not {len(depths)} layer numbers in rising order.")
        return tuple(given)
    found: list[int] = []
    for depth in depths:
        found.append(max(round(depth * layers), found[-1] + 1 if found else 1))
    return tuple(found)
