"""What pip installs: run from a folder outside the checkout, in environments that hold nothing else of ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from mmefficient import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "mmefficient": "mmefficient",
    "models": "mmefficient/models",
    "kernels": "mmefficient/kernels",
    "demo": "mmefficient/demo",
}
OUTSIDE = """
import importlib.util, sys
import mmefficient, mmefficient.demo, mmefficient.kernels, mmefficient.models.reference
assert not {name for name in ("models", "kernels", "demo") if importlib.util.find_spec(name)}
print(mmefficient.__file__, mmefficient.models.__file__, sep="\\n")
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path, *requirement: object) -> Path:
    """A fresh virtual environment that sees the packages of this one (but not its editable installs); its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).strip()
    Path(site, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--ignore-installed", *requirement, cwd=folder.parent)
    return python


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build from, so that nothing old in build/ can get in."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, tree, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


def test_the_wheel_holds_every_module_and_data_file_and_nothing_at_top_level(tree: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{target}/{path.relative_to(tree / folder)}"
        for folder, target in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    assert expected <= names, sorted(expected - names)
    assert {name.split("/")[0] for name in names} == {"mmefficient", f"mmefficient-{__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_folder_of_modules_is_a_package(tree: Path) -> None:
    bare = {path.parent for folder in FOLDERS for path in (tree / folder).rglob("*.py")}
    assert not {folder for folder in bare if not (folder / "__init__.py").is_file()}


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    places = run(installed, "-c", OUTSIDE, cwd=tmp_path).split()
    assert all(Path(place).is_relative_to(installed.parent.parent) for place in places)


def test_the_wheel_answers_with_its_own_weights_and_picture(installed: Path, tmp_path: Path) -> None:
    command = ("ask", "sample", "Describe the image.", "--plan", "fastv(layer=2,keep=0.25)", "--json")
    found = json.loads(run(installed.parent / "mmefficient", *command, cwd=tmp_path))
    assert found["visual_tokens"]["total"] == 576
    assert "rabbit" in found["answer"]


def test_an_editable_install_works_outside_the_checkout(tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "--editable", tree)
    places = run(python, "-c", OUTSIDE, cwd=tmp_path).split()
    assert all(Path(place).is_relative_to(tree) for place in places)
    assert __version__ in run(python.parent / "mmefficient", "--version", cwd=tmp_path)


def test_the_version_has_one_source() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


FRESH = """
import time, sys
import torch
start = time.perf_counter()
import mmefficient
elapsed = time.perf_counter() - start
heavy = [m for m in sys.modules if m.startswith(("transformers.models", "gradio", "matplotlib"))]
assert not heavy, heavy
assert elapsed < 1, elapsed
"""


def test_importing_is_quick_and_light(tmp_path: Path) -> None:
    run(sys.executable, "-c", FRESH, cwd=tmp_path)
    run(sys.executable, "-c", "import sys, mmefficient.cli; assert 'torch' not in sys.modules", cwd=tmp_path)


def test_public_names(tmp_path: Path) -> None:
    code = "import mmefficient as mm; [getattr(mm, n) for n in mm.__all__]; assert set(mm.__all__) <= set(dir(mm))"
    run(sys.executable, "-c", code, cwd=tmp_path)
    run(sys.executable, "-c", "import mmefficient as mm; mm.Plan; mm.methods()[0].name; mm.methods()", cwd=tmp_path)
    with pytest.raises(subprocess.SubprocessError):
        subprocess.run([sys.executable, "-c", "import mmefficient as mm; mm.nothing"], check=True, capture_output=True)
