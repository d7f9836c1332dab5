"""The Python in the documentation runs as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmefficient.methods import _registry as registry
from mmefficient.methods import methods
from mmefficient.points import Reducer
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


def defined(name: str) -> bool:
    """Whether the package has `folder/name`, or a class or module `first` with something called `second` in it."""
    if "/" in name:
        return (DOCS.parent / name).exists()
    *before, second = name.split(".")
    first = before[-1]
    inside = rf"^\s*(def|class) {second}\b|^\s*{second}\b.*[:=]"
    for path in [*DOCS.parent.glob("mmefficient/**/*.py"), *DOCS.parent.glob("kernels/**/*.py")]:
        text = path.read_text()
        found = path.stem == first or path.parent.name == first or re.search(rf"^class {first}\b", text, re.MULTILINE)
        if found and re.search(inside, text, re.MULTILINE):
            return True
    return False


REDUCERS = {each.name: each for each in methods() if issubclass(each, Reducer)}


@pytest.mark.parametrize("name", REDUCERS)
def test_pages_of_reducers_say_where_each_part_of_a_paper_is(name: str) -> None:
    """A table paper, function, difference; functions that it names are there, and nothing in it is empty."""
    text = (DOCS / "methods" / f"{name}.md").read_text()
    table = re.search(r"^\| paper[^|]*\| here \| difference \|\n\|---\|---\|---\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    assert table is not None
    rows = [line.strip("|").split("|") for line in table[1].splitlines()]
    assert all(len(row) == 3 and row[0].strip() and row[1].strip() for row in rows)
    named = {each for row in rows for each in re.findall(r"`([A-Za-z_][\w./]*[./][\w./]+)`", row[1])}
    assert named
    assert [each for each in sorted(named) if not defined(each)] == []
    assert f"\n    {name}(" in text
    assert ("**Turns**" in text) or ("**turns**" in text)


def test_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("sentences.md") == 1
    assert "rejected: [', a person']" in capsys.readouterr().out
