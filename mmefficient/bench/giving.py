"""What the commands of `mmefficient bench` begin and end with. Heavy imports stay inside, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmefficient.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmefficient.bench.result import Target


def open_target(model: str, device: str, dtype: str, *, small: bool = False) -> Target:
    """As `Target.open`, without the chatter of other libraries."""
    from mmefficient.bench.result import Target
    from mmefficient.cli import quiet

    quiet()
    return Target.open(model, device, dtype, small=small)


def readable_plans(plans: list[str] | None) -> list[str] | None:
    """The plans as they are; one that cannot be read raises PlanError before a model is loaded."""
    from mmefficient.plan import Plan

    for text in plans or []:
        Plan(text)
    return plans


def need_gpu(what: str) -> None:
    """Raises InputError if no GPU can make `what`."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"{what} needs a CUDA GPU; none is visible.")


def picture_size(text: str) -> tuple[int, int]:
    """Width and height, of text like 672x672; InputError if it is not."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise InputError(f"{text!r} is not the size of a picture; write it like 672x672.")
    return int(width), int(height)


def give(result: dict[str, Any], tables: str, out: Path | None, draw: Any) -> None:
    """Print the tables and write the files. Exit code 1 if something was wrong: a benchmark is also a test."""
    if out is not None:
        from mmefficient.bench.result import write

        for path in write(result, tables, out, _drawn(draw, result)):
            typer.echo(f"wrote {path}", err=True)
    typer.echo(tables)
    failed = [row for row in result["rows"] if "failed" in row]
    if failed:
        typer.echo(f"{len(failed)} of {len(result['rows'])} rows failed their check and have no times.", err=True)
        raise typer.Exit(1)


def give_file(result: dict[str, Any], tables: str, out: Path | None) -> None:
    """Write the result to a file of its own, and print the tables."""
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(tables)


def _drawn(draw: Any, result: dict[str, Any]) -> Figure | None:
    try:
        figure: Figure = draw(result)
    except ImportError:
        typer.echo("no PNG: matplotlib is missing; pip install 'mmefficient[eval]' brings it.", err=True)
        return None
    return figure
