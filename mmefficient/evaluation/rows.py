"""Annotation files as rows that know where they came from, so that whatever is wrong with one can be named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmefficient.errors import InputError
from mmefficient.images import load_image

SHORT_HASH = 16  # hex digits: enough to tell files apart, short enough to read


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

    def texts(self, name: str, count: int | None = None) -> tuple[str, ...]:
        """A list of strings that is not empty (of length `count` if given)."""
        value = self.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise BadRecordError(f'the field "{name}" must be a list of texts, but is {_show(value)}')
        if count is not None and len(value) != count:
            raise BadRecordError(f'the field "{name}" must hold {count} texts, but holds {len(value)}')
        return tuple(value)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """One of the texts `allowed`, whatever its case."""
        value = self.text(name)
        if value.lower() not in allowed:
            raise BadRecordError(f'the field "{name}" must be one of {", ".join(allowed)}, but is {_show(value)}')
        return value.lower()

    def picture(self, name: str, *folders: str) -> Picture:
        """The picture called `name`, looked for in the data folder's `folders` in order."""
        return self._find_picture(self, name, folders or (".",))


class Files:
    """A folder of annotation files and pictures; `hashes` holds the sha256 of every file read, by relative path."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.hashes: dict[str, str] = {}

    def find(self, *patterns: str) -> Path:
        """The file that the first matching glob pattern matches.

        Raises:
            InputError: no pattern matches, or one matches several files.
        """
        found = self.maybe(*patterns)
        if found is None:
            needed = " or ".join(patterns)
            raise InputError(f"{self.folder} lacks {needed}, which the task {self.task} needs; see docs/evaluation.md.")
        return found

    def maybe(self, *patterns: str) -> Path | None:
        """As `find`, but None where nothing matches."""
        for pattern in patterns:
            matches = sorted(self.folder.glob(pattern))
            if len(matches) > 1:
                listed = ", ".join(path.name for path in matches)
                raise InputError(f"{self.folder} has several files {pattern} ({listed}); leave only the one to use.")
            if matches:
                return matches[0]
        return None

    def json(self, path: Path) -> Any:
        """The content of a JSON file; a key that occurs twice in one object is listed in its `repeated`."""
        text = self._text(path)
        try:
            return json.loads(text, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error}); download it again.") from None

    def array(self, path: Path, key: str | None = None) -> list[Row]:
        """The rows of a JSON list, which is the file itself or lies under `key`."""
        value = self.json(path)
        if key is not None:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, list):
            place = "" if key is None else f' under "{key}"'
            raise InputError(f"{path} must hold a JSON list{place}; is it the official file?")
        return [self._row(path, f"record {number}", item) for number, item in enumerate(value, 1)]

    def keyed(self, path: Path) -> dict[str, Row]:
        """The rows of a JSON object of objects; a key that occurs twice makes its row a bad one."""
        value = self.json(path)
        if not isinstance(value, _Object):
            raise InputError(f"{path} must hold a JSON object with one entry per record; is it the official file?")
        bad = BadRecordError("it occurs twice in the file")
        repeated = set(value.repeated)
        return {key: self._row(path, f'record "{key}"', bad if key in repeated else one) for key, one in value.items()}

    def json_lines(self, path: Path) -> list[Row]:
        """The rows of a file of JSON objects, one per line, or of one JSON list."""
        if self._bytes(path).lstrip()[:1] == b"[":
            return self.array(path)
        return [
            self._row(path, f"line {number}", _parsed(line))
            for number, line in enumerate(self._bytes(path).split(b"\n"), 1)
            if line.strip()
        ]

    def lines(self, path: Path, *names: str) -> list[Row]:
        """The rows of a text file with tab-separated fields `names`, without a header."""
        rows = []
        for number, line in enumerate(self._bytes(path).split(b"\n"), 1):
            if line.strip():
                rows.append(self._row(path, f"line {number}", _fields(line, names)))
        return rows

    def table(self, path: Path) -> list[Row]:
        """The rows of a tab-separated table with a header line; quotes as in CSV."""
        text = self._text(path)
        limit = csv.field_size_limit(sys.maxsize)  # pictures in base64 exceed the default; the limit is process-wide
        try:
            lines = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        except csv.Error as error:
            raise InputError(f"{path} is not a tab-separated table ({error}); download it again.") from None
        finally:
            csv.field_size_limit(limit)
        header, *rest = lines or [[]]
        return [self._row(path, f"record {number}", _cells(line, header)) for number, line in enumerate(rest, 1)]

    def row(self, path: Path, place: str, value: object) -> Row:
        """A row that a task puts together itself."""
        return self._row(path, place, value)

    def _row(self, path: Path, place: str, value: object) -> Row:
        return Row(f"{self._name(path)}, {place}", value, self._picture)

    def _picture(self, row: Row, name: str, folders: Sequence[str]) -> Picture:
        paths = [path for folder in folders if (path := self.folder / folder / name).is_file()]
        if not paths:
            raise BadRecordError(f"there is no picture {name} in {self.folder} ({' or '.join(folders)})")
        return Picture(name, row.where, lambda: load_image(paths[0]))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _bytes(self, path: Path) -> bytes:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
        self.hashes[self._name(path)] = hashlib.sha256(content).hexdigest()[:SHORT_HASH]
        return content.removeprefix(b"\xef\xbb\xbf")

    def _text(self, path: Path) -> str:
        content = self._bytes(path)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(f"{path}, line {line}, is not UTF-8; convert the file, or download it again.") from None


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys occurred more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = _repeated(pairs) if len(self) < len(pairs) else ()


def _repeated(pairs: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    keys = [key for key, _ in pairs]
    return tuple(key for key in dict.fromkeys(keys) if keys.count(key) > 1)


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRecordError("it is not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"it is not JSON ({error})")


def _fields(line: bytes, names: Sequence[str]) -> object:
    try:
        fields = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return BadRecordError("it is not UTF-8")
    return _cells(fields, names)


def _cells(cells: Sequence[str], names: Sequence[str]) -> object:
    if len(cells) != len(names):
        return BadRecordError(f"it must have {len(names)} tab-separated fields ({', '.join(names)}), not {len(cells)}")
    return dict(zip(names, cells, strict=True))


def by_id(rows: Sequence[Row], name: str) -> Iterator[tuple[str, Row]]:
    """The rows with the value of their id field; rows without a usable one get their place instead."""
    for row in rows:
        try:
            yield row.id(name), row
        except BadRecordError:
            yield row.where, row


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
