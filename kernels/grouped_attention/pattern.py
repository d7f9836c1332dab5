"""Which query-key pairs exist, as a small table over the roles of the two tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

PAD, SYSTEM, IMAGE, SEPARATOR, QUESTION = range(5)
"""Roles of tokens; any text that is no system text counts as QUESTION."""

EVERY = 1 << SYSTEM | 1 << IMAGE | 1 << SEPARATOR | 1 << QUESTION
FAR = 1 << 30
"""A radius that reaches every token of the same image or page."""

ITSELF = -1
"""A radius that reaches the token itself alone."""

SOLO = 1 << 24


@dataclass(frozen=True)
class Pattern:
    """Query i may see key j if one of two sets holds j's role, and if j is near where nearness is asked for.

    Each field holds, for each role of the query (PAD, SYSTEM, IMAGE, SEPARATOR, QUESTION), a set of key roles as bits
    `1 << role`. Nobody sees padding, and padding sees nobody, whatever the sets say.

    Attributes:
        earlier: roles that are seen at the query's own place and before it.
        anywhere: roles that are seen wherever they stand.
        near: roles of which only near keys are seen: the token itself, and those of the same page (image, tile, ...)
            at most `radius` rows and columns away.
        radius: `ITSELF`, 0, 1, ..., or `FAR` for the whole page.
    """

    earlier: tuple[int, ...] = (0, EVERY, EVERY, EVERY, EVERY)
    anywhere: tuple[int, ...] = (0, 0, 0, 0, 0)
    near: tuple[int, ...] = (0, 0, 0, 0, 0)
    radius: int = ITSELF

    def __and__(self, other: Pattern) -> Pattern:
        """The pairs that exist in both.

        Raises:
            ValueError: the two ask for nearness of different roles, at different distances.
        """
        radii = set()
        for near, limit in zip(self.near, other.near, strict=True):
            if near and limit and near != limit and self.radius != other.radius:
                raise ValueError("these patterns limit different roles to different distances; one layout cannot.")
            if near or limit:
                radii.add(min(p.radius for bits, p in ((near, self), (limit, other)) if bits))
        if len(radii) > 1:
            raise ValueError("these patterns limit query roles to different distances; one layout cannot.")
        mine = [a | b for a, b in zip(self.earlier, self.anywhere, strict=True)]
        theirs = [a | b for a, b in zip(other.earlier, other.anywhere, strict=True)]
        return Pattern(
            tuple(a & b for a, b in zip(mine, theirs, strict=True)),
            tuple(a & b for a, b in zip(self.anywhere, other.anywhere, strict=True)),
            tuple(a | b for a, b in zip(self.near, other.near, strict=True)),
            radii.pop() if radii else ITSELF,
        )

    def rules(self) -> list[int]:
        """One integer per query role (bits 0-7 earlier, 8-15 anywhere, 16-23 near, 24 sees nobody else), the radius."""
        found = []
        for role, (earlier, anywhere, near) in enumerate(zip(self.earlier, self.anywhere, self.near, strict=True)):
            sets = (earlier | anywhere, anywhere, near) if role != PAD else (0, 0, 0)
            solo = not sets[0] or (self.radius == ITSELF and not sets[0] & ~near and sets[0] >> role & 1)
            found.append(sets[0] | sets[1] << 8 | sets[2] << 16 | (SOLO if solo else 0))
        return [*found, self.radius]

    @property
    def uses_places(self) -> bool:
        """Whether page, row and column of the tokens matter."""
        return any(self.near) and self.radius != ITSELF


def _of_images(sets: int, otherwise: int = EVERY) -> tuple[int, ...]:
    return tuple(0 if role == PAD else sets if role == IMAGE else otherwise for role in range(5))


def causal() -> Pattern:
    """Every token sees itself and what precedes it."""
    return Pattern()


def no_visual_self_attention(rows: str = "self") -> Pattern:
    """Visual tokens do not see each other; text sees everything before it.

    Args:
        rows: what a visual token sees: "self" (its own key alone, so its output is its own value), "nothing" (its
            output is zero) or "text" (the text before it, and itself).

    Raises:
        ValueError: `rows` is something else.
    """
    image = 1 << IMAGE
    sets = {"self": image, "nothing": 0, "text": EVERY}
    if rows not in sets:
        raise ValueError(f"rows is one of {', '.join(sets)}, not {rows!r}.")
    return Pattern(earlier=_of_images(sets[rows]), near=_of_images(image, 0), radius=ITSELF)


def window(radius: int, bidirectional: bool = False) -> Pattern:
    """A visual token sees the text before it, and of its own image what is at most `radius` rows and columns away.

    Args:
        bidirectional: also what comes later in the prompt.
    """
    image = 1 << IMAGE
    return Pattern(anywhere=_of_images(image if bidirectional else 0, 0), near=_of_images(image, 0), radius=radius)


def image_sees_question() -> Pattern:
    """Causal, and visual tokens see the question that follows them."""
    return Pattern(anywhere=_of_images(1 << QUESTION, 0))


def pages_apart() -> Pattern:
    """Causal, and visual tokens of one page (image, frame, ...) do not see those of another."""
    return Pattern(near=_of_images(1 << IMAGE, 0), radius=FAR)


@lru_cache(maxsize=64)
def table(patterns: tuple[Pattern, ...], device: torch.device) -> torch.Tensor:
    """`rules` of each pattern, int32 [patterns, 6]."""
    return torch.tensor([pattern.rules() for pattern in patterns], dtype=torch.int32, device=device)
