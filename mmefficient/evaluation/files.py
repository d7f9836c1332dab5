"""A folder of annotation files, read as rows in the formats that data sets are published in."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmefficient.errors import InputError
from mmefficient.evaluation.rows import BadRecordError, Picture, Row
from mmefficient.images import load_image

T = TypeVar("T")

SHORT_HASH = 16  # hex digits: enough to tell files apart, short enough to read


_LISTED = 8  # files of one folder that a report lists one by one


class Files:
    """A folder of annotation files and pictures.

    `bad(where, what)` is told of records that cannot be used, and raises or lists them. `hashes` holds the sha256 (16
    hex digits) of every file read, by relative path.
    """

    def __init__(self, task: str, folder: Path, bad: Callable[[str, str], None]) -> None:
        self.task, self.folder, self.bad = task, folder, bad
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
        if key is not None:
            return self.arrays(path, key)[key]
        return self._array(path, self.json(path), "record")

    def arrays(self, path: Path, *keys: str) -> dict[str, list[Row]]:
        """The rows of the JSON lists that lie under `keys` of one file."""
        value = self.json(path)
        lists = value if isinstance(value, dict) else {}
        return {key: self._array(path, lists.get(key), key) for key in keys}

    def _array(self, path: Path, value: object, name: str) -> list[Row]:
        if not isinstance(value, list):
            place = "" if name == "record" else f' under "{name}"'
            raise InputError(f"{path} must hold a JSON list{place}; is it the official file?")
        return [self._row(path, f"{name} {number}", item) for number, item in enumerate(value, 1)]

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
        if self.read(path).lstrip()[:1] == b"[":
            return self.array(path)
        return [
            self._row(path, f"line {number}", _parsed(line))
            for number, line in enumerate(self.read(path).split(b"\n"), 1)
            if line.strip()
        ]

    def lines(self, path: Path, *names: str) -> list[Row]:
        """The rows of a text file with tab-separated fields `names`, without a header."""
        rows = []
        for number, line in enumerate(self.read(path).split(b"\n"), 1):
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

    def each(self, rows: Iterable[Row], read: Callable[[Row], T]) -> Iterator[tuple[Row, T]]:
        """Every row with what `read` makes of it; those it cannot read are told to `bad`."""
        for row in rows:
            try:
                value = read(row)
            except BadRecordError as error:
                self.bad(row.where, str(error))
            else:
                yield row, value

    def index(self, rows: Iterable[Row], name: str) -> dict[str, Row]:
        """The rows by their id field; a second row of the same id is told to `bad`."""
        found: dict[str, Row] = {}
        for row, key in self.each(rows, lambda row: row.id(name)):
            if key in found:
                self.bad(row.where, f'its {name} "{key}" is that of {found[key].where}')
            found.setdefault(key, row)
        return found

    def summary(self) -> dict[str, str]:
        """`hashes`, with one hash for the files of a folder that holds many."""
        folders: dict[str, list[str]] = defaultdict(list)
        for name in self.hashes:
            folders[name.rpartition("/")[0]].append(name)
        result: dict[str, str] = {}
        for folder, names in folders.items():
            if len(names) <= _LISTED:
                result |= {name: self.hashes[name] for name in names}
            else:
                content = "".join(f"{name} {self.hashes[name]}\n" for name in sorted(names))
                whole = hashlib.sha256(content.encode()).hexdigest()[:SHORT_HASH]
                result[f"{folder}/ ({len(names)} files)"] = whole
        return result

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

    def read(self, path: Path) -> bytes:
        """The content of a file, without a byte order mark."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
        self.hashes[self._name(path)] = hashlib.sha256(content).hexdigest()[:SHORT_HASH]
        return content.removeprefix(b"\xef\xbb\xbf")

    def _text(self, path: Path) -> str:
        content = self.read(path)
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
