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

    `visual_tokens` is the mean over decoder layers of the visual tokens kept, of `visual_total` in the prompt. FLOPs
    and times (ms per stage) are the batch's, divided by its number of questions.
    """

    id: str
    text: str
    truncated: bool
    visual_tokens: float
    visual_total: int
    prefill_flops: float
    prefill_flops_without_plan: float
    ms: dict[str, float] = field(default_factory=dict)


class AnswerLog:
    """The answers to `ids`, in their order, appended batch by batch; with a path they are also kept on disk."""

    def __init__(self, path: Path | None, header: Mapping[str, object], ids: Sequence[str]) -> None:
        """Reads what an earlier run left at `path`.

        Raises:
            InputError: the file was made with another header, or is not what a run of these questions writes. An
                unfinished last line, as a kill leaves it, is dropped.
        """
        self.path = path
        self.answers: list[Answer] = []
        self._ids = ids
        self._ends: list[int] = []  # file size after the header and after each answer
        self._file: BinaryIO | None = None
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        if b"\n" in content:
            self._read(content, header)
        else:
            line = _line(header)
            path.write_bytes(line)
            self._ends.append(len(line))
        self._file = path.open("r+b")
        self.cut(len(self.answers))

    def _read(self, content: bytes, header: Mapping[str, object]) -> None:
        size = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if number == 0:
                    _check_header(self.path, entry, header)
                else:
                    self.answers.append(_answer(entry, self._ids[number - 1 : number]))
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{self.path}, line {number + 1}, is not an answer of this run ({error}). "
                    "Delete the file, or the lines from there on, and run again."
                ) from None
            size += len(line)
            self._ends.append(size)

    def cut(self, count: int) -> None:
        """Forgets all but the first `count` answers."""
        del self.answers[count:]
        if self._file is not None:
            del self._ends[count + 1 :]
            self._file.truncate(self._ends[-1])
            self._file.seek(self._ends[-1])

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds one batch and hands it to the operating system, so that killing the process loses no finished batch."""
        self.answers.extend(answers)
        if self._file is not None:
            for answer in answers:
                line = _line(asdict(answer))
                self._file.write(line)
                self._ends.append(self._ends[-1] + len(line))
            self._file.flush()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; the answers stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _answer(entry: object, expected: Sequence[str]) -> Answer:
    if not isinstance(entry, dict) or entry.keys() != {f.name for f in fields(Answer)}:
        raise ValueError("its fields differ")
    answer = Answer(**entry)
    if [answer.id] != list(expected):
        raise ValueError(f"it answers {answer.id!r}, expected {expected[0]!r}" if expected else "one answer too many")
    numbers = (answer.visual_tokens, answer.visual_total, answer.prefill_flops, answer.prefill_flops_without_plan)
    if not (
        isinstance(answer.text, str)
        and isinstance(answer.truncated, bool)
        and isinstance(answer.ms, dict)
        and all(isinstance(number, int | float) for number in (*numbers, *answer.ms.values()))
    ):
        raise ValueError("a field has the wrong type")
    return answer


def _check_header(path: Path | None, found: object, expected: Mapping[str, object]) -> None:
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
