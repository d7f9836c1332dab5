from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmefficient import __version__, environment


def test_facts_are_plain_json() -> None:
    facts = environment.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["mmefficient"] == __version__
    assert facts["packages"]["torch"]
    assert facts["packages"]["transformers"]
    assert facts["cpu"]["cores"] >= 1
    assert facts["problems"] == []


def test_a_missing_package_is_none() -> None:
    assert environment._version("no-such-package-anywhere") is None


def test_the_commit_is_that_of_the_checkout_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: dict[str, str | None] = {"rev-parse": "abc123", "status": None}
    monkeypatch.setattr(environment, "_output", lambda *command: said[command[3]])
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "mmefficient" / "environment.py"))
    assert environment._commit() is None  # an installed package inside somebody else's repository
    (tmp_path / ".git").mkdir()
    assert environment._commit() == "abc123"
    said["status"] = "M module.py"
    assert environment._commit() == "abc123+changes"
    said["rev-parse"] = None
    assert environment._commit() is None


def test_a_command_that_fails_or_hangs_says_nothing() -> None:
    assert environment._output("sh", "-c", "echo ' yes '") == "yes"
    assert environment._output("sh", "-c", "echo no; exit 3") is None
    assert environment._output("no-such-command-anywhere") is None


def test_a_torchvision_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(environment.importlib, "import_module", refuse)
    (problem,) = environment._problems()
    assert "torchvision::nms" in problem
    assert "pip install" in problem


def test_without_proc_and_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    assert environment._cpu_model()
    assert environment._driver() is None
