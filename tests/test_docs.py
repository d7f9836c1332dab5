"""The Python in the documentation runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def test_usage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mmefficient.models.reference.path", lambda: checkpoint)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "usage.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/usage.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "[16, 16, 4, 4]" in printed
    assert "did you mean 'fastv'" in printed
