"""CHAIR on COCO (Rohrbach et al. 2018, arXiv 1809.02156): objects that a description mentions and the picture lacks.

Files: `instances_{val,train}2014.json` and `captions_{val,train}2014.json` (in `annotations/` or beside it; the train
files are optional), the pictures, and optionally `image_ids.txt` or `image_ids.json`, the ids to describe. Without that
list: the 500 ids of val2014 whose sha256, as decimal text, is smallest, which no file system and no library changes.

A variant's mode is the family of evaluators (`metrics.chair_coco`) that finds objects in descriptions and in reference
captions alike; the kind of its records, and so the name of its scores, has the family in it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.metrics.chair import chair
from mmefficient.evaluation.metrics.chair_coco import coco_lexicon, facts
from mmefficient.evaluation.rows import BadRecordError, Row
from mmefficient.evaluation.task import Record

SUBSET = 500


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    ids = _listed(files)
    names: dict[str, str] = {}
    objects: dict[str, set[str]] = defaultdict(set)
    captioned: set[str] = set()
    for split in ("val2014", "train2014"):
        find = files.find if split == "val2014" else files.maybe
        instances, captions = (
            find(f"annotations/{part}_{split}.json", f"{part}_{split}.json") for part in ("instances", "captions")
        )
        if instances is None or captions is None:
            continue
        content = files.arrays(instances, "images", "categories", "annotations")
        pictures = files.index(content["images"], "id")
        ids = _subset(pictures) if ids is None else ids
        wanted = set(ids)
        named = files.each((row for key, row in pictures.items() if key in wanted), lambda row: row.text("file_name"))
        names |= {row.id("id"): name for row, name in named}
        nodes = {row.id("id"): node for row, node in files.each(content["categories"], _node)}
        for row, key in files.each(content["annotations"], lambda row: row.id("image_id")):
            if (node := nodes.get(row.option("category_id"))) is None:
                files.bad(row.where, f"its category {row.field('category_id')} is none of the file's")
            elif key in wanted:
                objects[key].add(node)
        read = files.each(files.array(captions, "annotations"), _caption)
        for _, (key, caption) in read:
            if key in wanted:
                objects[key].update(coco_lexicon(variant.mode).mentions(caption))
                captioned.add(key)
    source = files.find("image_ids.*", "annotations/instances_val2014.json", "instances_val2014.json")
    for key in ids or ():
        value: object = {"id": key, "file": names.get(key), "objects": sorted(objects[key])}
        if key not in names:
            value = BadRecordError("no instance file knows this picture")
        elif key not in captioned:
            value = BadRecordError("no caption file describes this picture, which CHAIR's truth needs")
        yield files.row(source, f"image {key}", value)


def _node(row: Row) -> str:
    row.id("id")
    name = row.text("name")
    if name not in coco_lexicon().nodes:
        raise BadRecordError(f'the category "{name}" is not one of COCO\'s 80')
    return coco_lexicon().nodes[name]


def _caption(row: Row) -> tuple[str, str]:
    return row.id("image_id"), row.text("caption", empty=True)


def _listed(files: Files) -> list[str] | None:
    path = files.maybe("image_ids.txt", "image_ids.json")
    if path is None:
        return None
    if path.suffix == ".json":
        rows = [files.row(path, f"record {n}", {"id": row.value}) for n, row in enumerate(files.array(path), 1)]
    else:
        rows = files.lines(path, "id")
    return [key for _, key in files.each(rows, lambda row: row.id("id"))]


def _subset(ids: Iterable[str]) -> list[str]:
    return sorted(ids, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:SUBSET]


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(row.text("file"), "val2014", "train2014", "images", "images/val2014", "images/train2014", ".")
    kind = "caption" if variant.mode == "tables" else f"caption-{variant.mode}"
    return Record(row.id("id"), kind, variant.prompt, picture.id, row.texts("objects", empty=True), picture)


_OPERA, _PAI = "Please describe this image in detail.", "Please help me describe the image in detail."

TASK = Dataset(
    name="chair",
    variants={
        "opera": Variant(_OPERA, 512, "tables"),
        "opera-64": Variant(_OPERA, 64, "tables"),
        "ad-hh": Variant(_OPERA, 128, "tables"),
        "pai": Variant(_PAI, 512, "tables"),
        "opera-pattern": Variant(_OPERA, 512, "pattern"),
        "opera-wordnet": Variant(_OPERA, 512, "wordnet"),
        "pai-wordnet": Variant(_PAI, 512, "wordnet"),
    },
    rows=_rows,
    record=_record,
    scorers={
        "caption": chair(coco_lexicon()),
        "caption-pattern": chair(coco_lexicon("pattern")),
        "caption-wordnet": chair(coco_lexicon("wordnet")),
    },
    facts=facts(),
)
