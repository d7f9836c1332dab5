"""Profiles: facts measured, and parameters fitted, once per checkpoint; small files that know where they came from.

A profile is `<kind>-<name>.json`, with `<kind>-<name>.safetensors` beside it if it has parameters. It is found by its
kind and by the weights it was made with, in this folder and in those that the variable MMEFFICIENT_PROFILES lists.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmefficient.errors import InputError, ModelError

FOLDERS = "MMEFFICIENT_PROFILES"
_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Profile:
    """One measured fact.

    Attributes:
        kind: the method it is for.
        weights: `Checkpoint.weights` of the model it was measured on.
        facts: plain data.
        made: the command, versions and hardware that made it.
        path: where it was read from.
    """

    kind: str
    weights: str
    facts: Mapping[str, Any]
    made: Mapping[str, Any]
    path: Path | None = None

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Raises InputError if `path` is no profile."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(found["kind"], found["weights"], found["facts"], found["made"], path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a profile ({error}); make one as the method's page says.") from error

    @classmethod
    def make(cls, kind: str, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Profile:
        """A profile that says which command, versions and hardware made it."""
        from mmefficient.environment import collect, command

        return cls(kind, checkpoint.weights, facts, {"command": command(), **collect()})

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write `path` (.json), and `tensors` beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            from safetensors.torch import save_file

            save_file({name: x.contiguous() for name, x in tensors.items()}, path.with_suffix(".safetensors"))
        plain = {name: value for name, value in asdict(self).items() if name != "path"}
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    def tensors(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The parameters beside the profile.

        Raises:
            InputError: there are none.
        """
        from safetensors.torch import load_file

        assert self.path is not None
        beside = self.path.with_suffix(".safetensors")
        if not beside.exists():
            raise InputError(f"{beside} is missing; a profile with parameters is two files that stay together.")
        return {name: x.to(device, dtype) for name, x in load_file(beside).items()}


class Checkpoint:
    """A model as far as methods may know it: how many decoder layers it has, and which weights.

    Attributes:
        layers: decoder layers.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self._model, self.layers = model, layers

    @cached_property
    def weights(self) -> str:
        """A hash of the values of every parameter, whatever they are called and wherever they came from.

        Up to 4096 evenly spaced values of each enter, as float32: seconds for billions of parameters, once per model.
        """
        if self._model not in _hashes:
            each = []
            for parameter in self._model.parameters():
                values = parameter.detach().flatten()
                values = values[:: max(1, values.numel() // 4096)].float().cpu()
                each.append(hashlib.sha256(str(tuple(parameter.shape)).encode() + values.numpy().tobytes()).digest())
            _hashes[self._model] = hashlib.sha256(b"".join(sorted(each))).hexdigest()[:16]
        return _hashes[self._model]

    def profile(self, kind: str, given: str = "auto") -> Profile:
        """The profile of `kind` made with these weights, or, whatever weights it was made with, the file `given`.

        Raises:
            ModelError: there is none.
            InputError: `given` is not a profile of that kind.
        """
        if given != "auto":
            profile = Profile.read(given)
            if profile.kind != kind:
                raise InputError(f"{given} is a profile for {profile.kind!r}, not for {kind!r}.")
            return profile
        own = str(Path(__file__).parent)
        for folder in [*filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)), own]:
            for path in sorted(Path(folder).glob(f"{kind}-*.json")):
                profile = Profile.read(path)
                if profile.kind == kind and profile.weights == self.weights:
                    return profile
        raise ModelError(
            f"there is no {kind} profile for this checkpoint; make one as docs/methods/{kind}.md says, "
            f"or name the folder it lies in with {FOLDERS}."
        )
