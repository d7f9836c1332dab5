"""`Dataset`: an evaluation task declared over annotation files, made into a `Task` for one place on disk or hub."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import device

from mmefficient.errors import InputError
from mmefficient.evaluation.files import SHORT_HASH, Files
from mmefficient.evaluation.hub import Hub, is_hub, load_rows
from mmefficient.evaluation.rows import BadRecordError, LeftOutError, Picture, Row
from mmefficient.evaluation.task import Kind, Record, Scorer, Task


@dataclass(frozen=True)
class Variant:
    """A way to ask: the prompt around a record's fields (`str.format`), the longest answer, and a task's own `mode`."""

    prompt: str
    max_new_tokens: int = 16
    mode: str = ""


@dataclass(frozen=True)
class Dataset:
    """A task in its official file format.

    `variants`: the ways to ask, by name; the first is the default. `rows(files, variant)` reads the annotation files,
    `record(row, variant)` makes one record; what either finds wrong with a row is a `BadRecordError`, what is sound but
    not part of the task a `LeftOutError`. `scorers` by kind of question. `hub` says how a hub copy's columns map to
    the official fields; `default()` is where the data is when none is given. `facts` go into every report.
    """

    name: str
    variants: Mapping[str, Variant]
    rows: Callable[[Files, Variant], Iterable[Row]]
    record: Callable[[Row, Variant], Record]
    scorers: Mapping[str, Scorer]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hub: Hub | None = None
    default: Callable[[], Path] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def task(self, data: str | PathLike[str] | None, variant: str | None, *, skip_bad: bool = False) -> Task:
        """The task on the annotations at `data`, which are read and checked now.

        Raises:
            InputError: no data, no such variant, a file that is missing or damaged, or (unless `skip_bad`) a record
                that cannot be used: a missing field or picture, a wrong type or encoding, an id used twice.
        """
        name = variant or next(iter(self.variants))
        if name not in self.variants:
            known = ", ".join(self.variants)
            raise InputError(f'The task {self.name} has no variant "{name}"; choose from: {known}.')
        chosen = self.variants[name]
        loaded = _Loaded(self, chosen, skip_bad)
        rows, facts = self._open(data, chosen, loaded)
        loaded.add(rows)
        return Task(
            name=self.name,
            kinds={kind: Kind(chosen.max_new_tokens, score) for kind, score in self.scorers.items()},
            records=loaded.select,
            pictures=_pictures,
            groups=self.groups,
            facts=lambda: {
                "variant": name,
                "prompt": chosen.prompt,
                "prompt_sha256": hashlib.sha256(chosen.prompt.encode()).hexdigest()[:SHORT_HASH],
                **self.facts,
                **facts,
                "left_out": dict(loaded.left_out),
                "skipped": len(loaded.skipped),
                "skipped_records": list(loaded.skipped.values()),
            },
        )

    def _open(
        self, data: str | PathLike[str] | None, variant: Variant, loaded: _Loaded
    ) -> tuple[Iterable[Row], dict[str, Any]]:
        if data is None and self.default is None:
            raise InputError(f"The task {self.name} needs annotation files: give data (--data), a folder or hub id.")
        if data is not None and is_hub(data):
            if self.hub is None:
                raise InputError(f"The task {self.name} reads official files only; give the folder that holds them.")
            return load_rows(str(data), self.hub), {"data": str(data), "split": self.hub.split}
        place = Path(data) if data is not None else self.default()  # type: ignore[misc]
        if not place.is_dir():
            raise InputError(f"There is no folder {place}; check data (--data).")
        files = Files(self.name, place, loaded.bad)
        rows = list(self.rows(files, variant))
        return rows, {"files": files.summary()}


class _Loaded:
    """The records of a data set, and what had to be left out of them."""

    def __init__(self, dataset: Dataset, variant: Variant, skip_bad: bool) -> None:
        self.dataset, self.variant, self.skip_bad = dataset, variant, skip_bad
        self.records: dict[str, Record] = {}
        self.left_out: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}  # place of the record -> what is wrong with it

    def add(self, rows: Iterable[Row]) -> None:
        places: dict[str, str] = {}
        for row in rows:
            try:
                record = self.dataset.record(row, self.variant)
                if record.kind not in self.dataset.scorers:
                    raise BadRecordError(f'the task knows no kind "{record.kind}"')
                if record.id in places:
                    raise BadRecordError(f'its id "{record.id}" is that of {places[record.id]}')
            except BadRecordError as error:
                self.bad(row.where, str(error))
            except LeftOutError as reason:
                self.left_out[str(reason)] += 1
            else:
                places[record.id] = row.where
                self.records[record.id] = record
        if not self.records:
            why = next(iter(self.skipped.values()), "the files hold none")
            raise InputError(f"The task {self.dataset.name} has no record that can be used ({why}); check the data.")

    def select(self, kinds: Sequence[str] | None, limit: int | None) -> list[Record]:
        """At most `limit` records of each kind; with `skip_bad` every picture is read once before the run."""
        chosen: list[Record] = []
        counts: Counter[str] = Counter()
        for record in self.records.values():
            wanted = (kinds is None or record.kind in kinds) and counts[record.kind] != limit
            if wanted and self._readable(record):
                chosen.append(record)
                counts[record.kind] += 1
        return chosen

    def _readable(self, record: Record) -> bool:
        if self.skip_bad and isinstance(record.source, Picture):
            try:
                record.source.read()
            except InputError as error:
                self.skipped[record.source.where] = str(error)
                return False
        return True

    def bad(self, where: str, what: str) -> None:
        """Refuses a record, or lists it."""
        if not self.skip_bad:
            raise InputError(f"{where}: {what}. Correct it, or leave such records out with skip_bad (--skip-bad).")
        self.skipped[where] = f"{where}: {what}"


def _pictures(records: Sequence[Record], where: device) -> list[Image]:
    sources = {record.picture: record.source for record in records}  # questions share pictures: read them once
    read = {name: source.read() for name, source in sources.items() if isinstance(source, Picture)}
    return [read[record.picture] for record in records]
