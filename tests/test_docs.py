"""The Python in the documentation runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def execute(name: str) -> int:
    """Run the blocks of one page in order; returns how many there are."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), names)
    return len(blocks)


def test_kernels() -> None:
    assert execute("kernels.md") == 1
    assert execute("kernels-decoding.md") == 1


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("usage.md") >= 6
    printed = capsys.readouterr().out
    assert "576 [576, 576, 144, 144" in printed
    assert "did you mean 'fastv'" in printed
    assert printed.partition("pipeline:")[2].strip()


def test_matchers(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("matchers.md") == 1
    assert "visual_total=576" in capsys.readouterr().out
