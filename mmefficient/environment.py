"""The facts a bug report, an evaluation report or a benchmark needs: versions, commit and hardware."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mmefficient import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "tokenizers",
    "accelerate",
    "safetensors",
    "pillow",
    "numpy",
)


def command() -> str:
    """The command that runs, as it would be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = [Path(sys.argv[0]).name]
    if spec is not None and sys.argv[0] == spec.origin:  # else the module stands in for another command
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*start, *sys.argv[1:]])


def collect() -> dict[str, Any]:
    """Everything known about this installation and machine, as plain JSON types. Works without a model and a GPU.

    Keys: ``mmefficient``, ``commit`` (of a checkout, with ``+changes`` if the tree differs; else what the variable
    MMEFFICIENT_COMMIT says, or None), ``python``, ``platform``, ``packages`` (name to version or None), ``cpu``
    (model, cores this process may use, torch threads, memory in GiB), ``cuda`` (version torch was built for or None),
    ``driver`` (or None), ``gpus`` (name, memory in GiB, compute capability) and ``problems`` (sentences; empty when
    nothing is wrong).
    """
    import torch

    return {
        "mmefficient": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
        },
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "gpus": [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
        "problems": _problems(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed, not a checkout: a surrounding repository would be somebody else's
        return os.environ.get("MMEFFICIENT_COMMIT")
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changed else head


def _output(*command: str) -> str | None:
    """The command's stripped output; None if it is missing, fails, hangs or says nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _driver() -> str | None:
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else None


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _problems() -> list[str]:
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails in many ways, often "torchvision::nms does not exist"
        return [f"torchvision does not fit torch ({error}); reinstall both together: pip install torch torchvision."]
    return []
