"""Answers on disk: one JSON line per question after a header line, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

from mmefficient.errors import InputError


@dataclass(frozen=True)
class Answer:
    """What a run keeps of one question.

    `kept` counts the visual tokens that each decoder layer held, of `visual_total` in the prompt. FLOPs and times (ms
    per stage) are the batch's, divided by its number of questions; `ms["vision"]` is divided by the number of pictures
    that were encoded, so it does not depend on how many questions happened to share a picture. `wall_ms` is what asking
    took by the clock: less, where pictures are shared, or are there already from the plan before.
    """

    id: str
    text: str
    truncated: bool
    kept: list[int]
    visual_total: int
    prefill_flops: float
    prefill_flops_without_plan: float
    ms: dict[str, float] = field(default_factory=dict)
    wall_ms: float = 0.0

    @property
    def visual_tokens(self) -> float:
        """Visual tokens kept, mean over decoder layers."""
        return sum(self.kept) / len(self.kept)


class AnswerLog:
    """The answers to `ids`, by id; given a folder they are also kept on disk, appended batch by batch.

    Processes that share a run share the folder: each reads what all of them left there, and writes a file of its own.
    """

    def __init__(
        self, folder: Path | None, name: str, header: Mapping[str, object], ids: Sequence[str], rank: int = 0
    ) -> None:
        """Reads what earlier runs left in the files of `folder` whose names begin with `name`.

        Raises:
            InputError: a file was made with another header, or is not what a run of these questions writes. An
                unfinished last line, as a kill leaves it, is dropped.
        """
        self.answers: dict[str, Answer] = {}
        self._ids = frozenset(ids)
        self._header = header
        self._size = 0  # of the complete lines in this process's file
        self._file: BinaryIO | None = None
        self._path = None if folder is None else folder / (f"{name}-{rank}.jsonl" if rank else f"{name}.jsonl")
        for path in [] if folder is None else sorted(folder.glob(f"{name}*.jsonl")):
            size = self._read(path)
            self._size = size if path == self._path else self._size

    def _read(self, path: Path) -> int:
        size = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 0:
                    _check_header(path, entry, self._header)
                else:
                    self._keep(_answer(entry))
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{path}, line {number + 1}, is not an answer of this run ({error}). "
                    "Delete the file, or the lines from there on, and run again."
                ) from None
            size += len(line)
        return size

    def _keep(self, answer: Answer) -> None:
        if answer.id not in self._ids:
            raise ValueError(f"it answers {answer.id!r}, which is not asked")
        if answer.id in self.answers:
            raise ValueError(f"it answers {answer.id!r} again")
        self.answers[answer.id] = answer

    def share(self, answers: Sequence[Answer]) -> None:
        """Takes over what other processes know."""
        self.answers |= {answer.id: answer for answer in answers if answer.id not in self.answers}

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds one batch and hands it to the operating system, so that killing the process loses no finished batch.

        Answers that are known already, because a kill cut the batch in two, stay as they are.
        """
        new = [answer for answer in answers if answer.id not in self.answers]
        self.share(new)
        if self._path is not None and new:
            self._file = self._file or self._open(self._path)
            self._file.write(b"".join(_line(asdict(answer)) for answer in new))
            self._file.flush()

    def _open(self, path: Path) -> BinaryIO:
        file = path.open("r+b" if path.exists() else "wb")
        file.truncate(self._size)
        file.seek(self._size)
        if not self._size:
            file.write(_line(self._header))
        return file

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; the answers stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _answer(entry: object) -> Answer:
    if not isinstance(entry, dict) or entry.keys() != {f.name for f in fields(Answer)}:
        raise ValueError("its fields differ")
    answer = Answer(**entry)
    numbers = (answer.visual_total, answer.prefill_flops, answer.prefill_flops_without_plan, answer.wall_ms)
    if not (
        isinstance(answer.id, str)
        and isinstance(answer.text, str)
        and isinstance(answer.truncated, bool)
        and isinstance(answer.ms, dict)
        and isinstance(answer.kept, list)
        and all(isinstance(number, int | float) for number in (*numbers, *answer.kept, *answer.ms.values()))
    ):
        raise ValueError("a field has the wrong type")
    return answer


def _check_header(path: Path, found: object, expected: Mapping[str, object]) -> None:
    expected = json.loads(_line(expected))
    if not isinstance(found, dict):
        raise ValueError("its header is missing")
    differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if differing:
        listed = "; ".join(f"{key} was {found.get(key)!r}, now {expected.get(key)!r}" for key in differing)
        raise InputError(
            f"{path} belongs to another run: {listed}. Choose another output directory, or repeat the run with the "
            "old settings."
        )
