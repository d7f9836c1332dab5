"""Draw a training log: ``python -m mmefficient.models.reference.curves LOG PNG`` (matplotlib: extra `eval`)."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def main(log: Path, png: Path) -> None:
    """Two panels: the share of questions answered exactly, per kind, and the losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text().splitlines()]
    answers = [record for record in records if record["phase"] == "answers"]
    steps = [record["step"] for record in answers]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind in answers[-1]["exact"]:
        left.plot(steps, [100 * record["exact"][kind] for record in answers], label=kind.removesuffix("-random"))
    left.set(title="training questions answered exactly", xlabel="step", ylabel="%", ylim=(0, 101))
    left.legend(fontsize=8)
    for name in ("answer", "align", "point", "dense", "offset"):
        right.plot(steps, [record[name] for record in answers], label=name)
    right.set(title="losses", xlabel="step", yscale="log")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(png, dpi=110)


if __name__ == "__main__":
    typer.run(main)
