"""The Python in the documentation runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "usage.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/usage.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "576 [576, 576, 144, 144" in printed
    assert "did you mean 'fastv'" in printed
