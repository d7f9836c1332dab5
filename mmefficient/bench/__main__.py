"""``python -m mmefficient.bench`` is ``mmefficient bench``, for a checkout without the command."""

from __future__ import annotations

import sys

from mmefficient.bench.cli import app
from mmefficient.cli import main

__all__ = ["app"]


if __name__ == "__main__":
    sys.argv[:1] = ["mmefficient", "bench"]
    main()
