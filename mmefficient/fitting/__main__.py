"""Profiles of a checkpoint, one command per method: ``python -m mmefficient.fitting --help``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="Folder for the profile; training goes on from the state it finds there.")]
Model = Annotated[str, typer.Option(help="reference, a folder or a hub id; it is asked about scenes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Minutes = Annotated[float, typer.Option(help="Stop (resumably) after this many minutes.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that make prompts.")]
WORKERS = min(12, max(0, (os.cpu_count() or 1) - 2))


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from mmefficient.loading import load

    torch.set_float32_matmul_precision("high")
    return load(model, device=device, dtype=dtype, attn_implementation=None)


def _say(path: Path | None) -> None:
    print(f"wrote {path}" if path else "the time is up; run the same command again to go on")


@app.command()
def exit(
    out: Out,
    model: Model = "reference",
    samples: Annotated[int, typer.Option(min=1, help="Prompts to measure on.")] = 256,
    threshold: Annotated[float, typer.Option(help="Largest mean divergence of the next token, in nats.")] = 0.02,
    rows: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Where exit(layer=auto) lets the image leave."""
    from mmefficient.fitting.exit import fit

    net, processor = _load(model, device, dtype)
    _say(fit(net, processor, out, samples=samples, rows=rows, threshold=threshold, seed=seed))


@app.command()
def dyvte(
    out: Out,
    model: Model = "reference",
    steps: Steps = 500,
    rows: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 192,
    lr: Rate = 1e-3,
    target: Annotated[float, typer.Option(help="Share of answers that the calibrated gates may change.")] = 0.003,
    checks: Annotated[int, typer.Option(min=1, help="Batches to calibrate on.")] = 30,
    seed: Seed = 0,
    minutes: Minutes = 1e6,
    workers: Workers = WORKERS,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """The gates of dyvte."""
    from mmefficient.fitting.dyvte import fit

    options = {"steps": steps, "rows": rows, "lr": lr, "target": target, "checks": checks, "seed": seed}
    _say(fit(*_load(model, device, dtype), out, minutes=minutes, workers=workers, **options))  # type: ignore[arg-type]


@app.command()
def urag(
    out: Out,
    model: Model = "reference",
    layer: Annotated[int, typer.Option(min=1, help="Decoder layer at whose input pages leave.")] = 3,
    pages: Annotated[int, typer.Option(min=2, help="Pictures per prompt.")] = 6,
    steps: Steps = 600,
    rows: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 16,
    lr: Rate = 1e-3,
    checks: Annotated[int, typer.Option(min=1, help="Batches to check on.")] = 16,
    seed: Seed = 0,
    minutes: Minutes = 1e6,
    workers: Workers = WORKERS,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """The retrieval head of urag."""
    from mmefficient.fitting.urag import fit

    options = {"layer": layer, "pages": pages, "steps": steps, "rows": rows, "lr": lr, "checks": checks, "seed": seed}
    _say(fit(*_load(model, device, dtype), out, minutes=minutes, workers=workers, **options))  # type: ignore[arg-type]


if __name__ == "__main__":
    # read by torch: threads that wait busily slow down the processes that make prompts
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
