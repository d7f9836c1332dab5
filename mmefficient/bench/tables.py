"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table; empty for None."""
    return "" if value is None else f"{value:.{digits}f}{unit}"


def markdown(titles: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    lines = [titles, ["---" if index < left else "---:" for index in range(len(titles))], *rows]
    return "\n".join(f"| {' | '.join(str(value) for value in line)} |" for line in lines)
