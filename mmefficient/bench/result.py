"""What every benchmark is given and what every result says about itself."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmefficient.bench import floors
from mmefficient.bench.engines import Engine, choose, prepare
from mmefficient.bench.presets import load
from mmefficient.environment import collect, command
from mmefficient.errors import InputError
from mmefficient.loading import resolve_device, resolve_dtype
from mmefficient.plan import Plan

SCHEMA = "mmefficient.bench/1"
STARTED = time.perf_counter()


def note(text: str) -> None:
    """Progress on stderr: a benchmark of a large model is silent for minutes otherwise."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


@dataclass
class Target:
    """A model to measure on, with its processor and the measured ceilings of its device."""

    name: str
    model: Any
    processor: Any
    ceilings: floors.Ceilings

    @classmethod
    def open(cls, name: str, device: str = "auto", dtype: str = "auto", *, small: bool = False) -> Target:
        """Load a preset or checkpoint; `auto` is bfloat16 on CUDA and float32 on a CPU. `small` as in `presets.load`.

        Raises:
            ModelError, InputError: no such model, device or dtype.
        """
        where = resolve_device(device)
        kind = resolve_dtype("bfloat16" if dtype == "auto" and where.type == "cuda" else dtype, where)
        model, processor = load(name, where, kind, small=small)
        prepare(model)
        note(f"loaded {name}")
        return cls(name, model, processor, floors.measure(where, kind))

    def engines(self, names: Sequence[str] | None) -> list[Engine]:
        return choose(names, self.model.device)

    def plans(self, texts: Sequence[str]) -> list[Plan]:
        return [Plan(text) for text in texts]


def header(benchmark: str, target: Target) -> dict[str, Any]:
    """Schema, command, model, machine, versions and commit."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": command(),
        "model": target.name,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "device": str(target.model.device),
        "attention": target.model.config.get_text_config()._attn_implementation,
        "ceilings": asdict(target.ceilings),
        "environment": collect(),
    }


def write(result: dict[str, Any], tables: str, folder: Path, figure: Any | None) -> list[Path]:
    """Write JSON, Markdown and, with a matplotlib figure, PNG, named after the benchmark and the model.

    Raises:
        InputError: the folder cannot be written.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(result["model"]).name)
    stem = folder / f"{result['benchmark']}-{name}"
    machine = result["environment"]["gpus"] if result["device"].startswith("cuda") else [result["environment"]["cpu"]]
    facts = [f"`{result['command']}`", machine[0].get("name") or machine[0].get("model"), result["dtype"]]
    facts += [f"{package} {result['environment']['packages'][package]}" for package in ("torch", "transformers")]
    facts += [f"commit {result['environment']['commit']}"]
    rates = result["ceilings"]
    facts += [f"{rates['flops'] / 1e12:.3g} TFLOP/s and {rates['bandwidth'] / 1e12:.3g} TB/s measured"]
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(result, indent=1) + "\n")
        paths[1].write_text(f"# {result['benchmark']}: {result['model']}\n\n{', '.join(facts)}.\n\n{tables}\n")
        if figure is not None:
            figure.savefig(paths[2], dpi=130)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder for --out.") from error
    return paths[: 2 if figure is None else 3]
