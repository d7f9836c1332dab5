"""The Python in the documentation runs as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmefficient.methods import _registry as registry
from tests import tiny
from tests.executor import test_batches

DOCS = Path(__file__).parent.parent / "docs"


def execute(name: str) -> int:
    """Run the blocks of one page in order; returns how many there are."""
    return run_page(name)[0]


def run_page(name: str) -> tuple[int, dict[str, Any]]:
    """The same, and the names that the blocks have defined."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    page = sys.modules["page"] = ModuleType("page")  # dataclasses look their module up
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), page.__dict__)
    return len(blocks), page.__dict__


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


def test_adding_a_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed file works, and the printed row passes in every family."""
    blocks, names = run_page("adding-a-method.md")
    assert blocks == 3
    assert "largest(keep=0.25) [144, 144" in capsys.readouterr().out
    monkeypatch.setitem(registry(), "largest", names["Largest"])
    for family in tiny.FAMILIES:
        test_batches.test_rows_equal_batch_one_and_hiding_equals_removing(family, "largest(keep=0.4)")


def test_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("sentences.md") == 1
    assert "rejected: [', a person']" in capsys.readouterr().out
