"""Rows of annotation files that know where they came from, so that whatever is wrong with one can be named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from mmefficient.errors import InputError


class BadRecordError(Exception):
    """Why one record cannot be used; never leaves this package."""


class LeftOutError(Exception):
    """Why a sound record is not part of the task (a video, a second picture); counted, not an error."""


@dataclass(frozen=True)
class Picture:
    """A picture that is read when it is asked about; `where` is the record that names it."""

    id: str
    where: str
    open: Callable[[], Image]

    def read(self) -> Image:
        """The picture as RGB.

        Raises:
            InputError: it cannot be read; the sentence names the record.
        """
        try:
            return self.open()
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error


class Row:
    """One annotation: a JSON object or table line, with typed access to its fields."""

    def __init__(self, where: str, value: object, find_picture: Callable[[Row, str, Sequence[str]], Picture]) -> None:
        """`value` is the object, or the `BadRecordError` that stands in its place."""
        self.where, self.value, self._find_picture = where, value, find_picture

    def get(self, name: str) -> Any:
        """The field `name`; a missing one is a `BadRecordError`, as are wrong types in the other getters."""
        if isinstance(self.value, BadRecordError):
            raise self.value
        if not isinstance(self.value, dict):
            raise BadRecordError("it is not an object with named fields")
        if name not in self.value:
            raise BadRecordError(f'the field "{name}" is missing')
        return self.value[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        """A string, stripped; not empty unless `empty` allows it (then null counts as empty)."""
        value = self.get(name)
        if empty and value is None:
            return ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise BadRecordError(f'the field "{name}" must be a text that is not empty, but is {_show(value)}')
        return value.strip()

    def id(self, name: str) -> str:
        """A whole number or a text, as text."""
        value = self.get(name)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(name)

    def whole(self, name: str) -> int:
        """A whole number."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRecordError(f'the field "{name}" must be a whole number, but is {_show(value)}')
        return value

    def texts(self, name: str, *, empty: bool = False) -> tuple[str, ...]:
        """A list of strings; not empty unless `empty` allows it."""
        value = self.get(name)
        if not isinstance(value, list) or not (value or empty) or not all(isinstance(item, str) for item in value):
            raise BadRecordError(f'the field "{name}" must be a list of texts, but is {_show(value)}')
        return tuple(value)

    def answers(self, name: str, count: int) -> tuple[str, ...]:
        """`count` annotators' answers: a list of texts, or of objects with an "answer"."""
        value = self.get(name)
        listed = value if isinstance(value, list) else []
        texts = [one.get("answer") if isinstance(one, dict) else one for one in listed]
        given = tuple(text.strip() for text in texts if isinstance(text, str))
        if not len(given) == len(texts) == count:
            raise BadRecordError(f'the field "{name}" must hold {count} answers, but is {_show(value)}')
        return given

    def has(self, name: str) -> bool:
        """Whether the row has the field."""
        return isinstance(self.value, dict) and name in self.value

    def field(self, name: str) -> Any:
        """The field `name` as it is; None where the row lacks it."""
        return self.value.get(name) if isinstance(self.value, dict) else None

    def option(self, name: str) -> str:
        """A text that may be missing, empty or "nan", as tables have them: then ""."""
        value = self.field(name)
        return "" if value is None or str(value).lower() in ("nan", "none") else str(value).strip()

    def also(self, **fields: object) -> Row:
        """The row with further fields."""
        value = {**self.value, **fields} if isinstance(self.value, dict) else self.value
        return Row(self.where, value, self._find_picture)

    def spoiled(self, why: str) -> Row:
        """The row as one that cannot be used."""
        return Row(self.where, BadRecordError(why), self._find_picture)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """One of the texts `allowed`, whatever its case."""
        value = self.text(name)
        if value.lower() not in allowed:
            raise BadRecordError(f'the field "{name}" must be one of {", ".join(allowed)}, but is {_show(value)}')
        return value.lower()

    def picture(self, name: str, *folders: str) -> Picture:
        """The picture called `name`, looked for in the data folder's `folders` in order."""
        return self._find_picture(self, name, folders or (".",))


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
