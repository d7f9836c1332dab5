"""``python -m mmefficient.bench`` is ``mmefficient bench``, for a checkout without the command."""

from __future__ import annotations

import sys

from mmefficient.bench.cli import app
from mmefficient.cli import main

__all__ = ["app"]

@app.command()
def selection(
    plan: Annotated[list[str] | None, typer.Option(help="A method to time; repeat for more.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """What choosing tokens costs: the greedy kernel beside plain loops, and whole decisions of methods."""
    from mmefficient.bench.selection import PLANS, run, table

    result = run(plan or PLANS, device=device, repeats=repeats)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
