"""Benchmarks, one command per published table: ``python -m mmefficient.bench --help``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def _group() -> None:
    """Keeps the name of a lone command on the command line."""


@app.command()
def latency(
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, reference, a folder or a hub id.")
    ] = "reference",
    plan: Annotated[list[str] | None, typer.Option(help="A plan to time; repeat for more.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="A batch size; repeat for more.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated per row.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto is bfloat16 on CUDA and float32 on a CPU.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """Vision, prefill and decode times of `generate` under plans, beside the prefill's floor."""
    from mmefficient.bench.latency import run, table

    result = run(model, plan or [], batch or [1], repeats=repeats, new_tokens=new_tokens, device=device, dtype=dtype)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


@app.command()
def kernels(
    out: Annotated[Path, typer.Option(help="Folder for kernels.json.")],
    only: Annotated[list[str] | None, typer.Option(help="A table to make; repeat for more.")] = None,
    tune: Annotated[bool, typer.Option(help="Also time other block sizes, warps, stages and schedules.")] = False,
    graph: Annotated[bool, typer.Option(help="Also time replayed CUDA graphs, which have no launches.")] = False,
    seconds: Annotated[float, typer.Option(help="Start no further case after this long.")] = 3600.0,
) -> None:
    """The kernels beside their peers and floors; needs a CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        typer.echo("the kernel table needs a CUDA GPU; none is visible.", err=True)
        raise typer.Exit(2)
    from mmefficient.bench.kernels import run

    raise typer.Exit(0 if run(out, only, tune, graph, seconds) else 1)


if __name__ == "__main__":
    app()
