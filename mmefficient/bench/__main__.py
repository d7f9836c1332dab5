"""``python -m mmefficient.bench`` is ``mmefficient bench``, for a checkout without the command."""

from __future__ import annotations

from mmefficient.bench.cli import app

if __name__ == "__main__":
    app(prog_name="python -m mmefficient.bench")
