"""Rows from a data set on the hub, or from a local copy of one, through the `datasets` library (extra `eval`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from mmefficient.errors import InputError
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.rows import Picture, Row
from mmefficient.images import load_image


@dataclass(frozen=True)
class Hub:
    """How a hub copy of a data set is read: its split, and {official field: column} where names differ.

    `images` are the columns that hold pictures; a row's picture is the first that is not empty.
    """

    split: str
    columns: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[str] = ("image",)


def is_hub(data: str | PathLike[str]) -> bool:
    """Whether `data` is a hub id ("owner/name", "owner/name:configuration"), or a folder of Parquet files."""
    place = Path(data)
    if place.is_dir():
        return any(place.glob("*.parquet")) or any(place.glob("data/*.parquet"))
    return not place.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", fspath(data)) is not None


def load_rows(name: str, hub: Hub) -> Iterator[Row]:
    """The rows of the split, with their official field names.

    Raises:
        InputError: `datasets` is not installed, or cannot load this.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("Data sets from the hub need an extra: pip install 'mmefficient[eval]'.") from None
    try:
        path, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
        table = datasets.load_dataset(path, config or None, split=hub.split)
        images = [column for column in hub.images if column in table.column_names]
        for column in images:
            table = table.cast_column(column, _encoded(datasets, table.features[column]))
    except Exception as error:  # the library raises many types, most of them about the network
        missing = "" if Path(name).is_dir() else f"There is no folder {name}, and "
        raise InputError(f"{missing}datasets cannot load {name}, split {hub.split} ({error}); check data.") from error

    def picture(index: int) -> Any:
        def find(row: Row, name: str, folders: Sequence[str]) -> Picture:
            return Picture(name, row.where, lambda: load_image(_bytes(table[index], images)))

        return find

    for index, value in enumerate(table.remove_columns(images)):
        value["record"] = index + 1
        fields = {**value, **{official: value[column] for official, column in hub.columns.items() if column in value}}
        yield Row(f"{name}, {hub.split}, record {index + 1}", fields, picture(index))


def load_parquet(files: Files, path: Path) -> Iterator[Row]:
    """The rows of one Parquet file; pictures are objects with "bytes".

    Raises:
        InputError: `pyarrow` is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise InputError("Parquet files need an extra: pip install 'mmefficient[eval]'.") from None
    try:
        rows = parquet.read_table(BufferReader(files.read(path))).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}); download it again.") from error
    for number, value in enumerate(rows, 1):
        yield files.row(path, f"record {number}", value)


def _encoded(datasets: Any, feature: Any) -> Any:
    """The feature of a picture column that leaves its pictures undecoded: only those asked about are decoded."""
    plain = datasets.Image(decode=False)
    return plain if isinstance(feature, datasets.Image) else datasets.List(plain)


def _bytes(value: Mapping[str, Any], images: Sequence[str]) -> Any:
    for column in images:
        one = value[column]
        one = one[0] if isinstance(one, list) and one else one
        if one:
            return one["bytes"] or one["path"]
    raise InputError("The row holds no picture.")
