"""Scenes: the embedded question set about procedural pictures (`mmefficient.models.reference.scenes`), test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor, device

from mmefficient.evaluation.metrics.accuracy import accuracy
from mmefficient.evaluation.metrics.chair import Lexicon, chair
from mmefficient.evaluation.metrics.pope import pope
from mmefficient.evaluation.task import Kind, Record, Task
from mmefficient.models.reference.scenes import splits
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.render import load_atlas, render
from mmefficient.models.reference.scenes.sample import scene_tensors

_SHORT, _CAPTION = 8, 64  # new tokens: an answer of a few words, a list of up to ten objects

_LEXICON = Lexicon({kind.name: (kind.plural,) for kind in OBJECTS})
_KINDS = {
    kind: Kind(_CAPTION, chair(_LEXICON))
    if kind == "caption"
    else Kind(_SHORT, pope if kind in splits.EXISTENCE_KINDS else accuracy)
    for kind in splits.KINDS
}


def _records(kinds: Sequence[str] | None, limit: int | None) -> list[Record]:
    return [record(question) for question in splits.load("test", kinds, limit)]


def record(question: splits.Question) -> Record:
    scene = question.scene
    content = hashlib.sha256(json.dumps([scene.layers, scene.background]).encode()).hexdigest()
    truth = tuple(dict.fromkeys(scene.names)) if question.kind.startswith("caption") else question.accepted
    picture = f"{question.source}@{content[:16]}"
    return Record(question.id, question.kind, question.text, picture, truth, question)


def _pictures(records: Sequence[Record], where: device) -> Tensor:
    sources = {record.picture: record.source for record in records}  # several questions share a picture: draw it once
    scenes = [source.scene for source in sources.values() if isinstance(source, splits.Question)]
    layers, background = scene_tensors(scenes)
    drawn = render(layers.to(where), background.to(where), load_atlas(where))
    order = list(sources)
    return drawn[[order.index(record.picture) for record in records]]


TASK = Task(
    name="scenes",
    kinds=_KINDS,
    records=_records,
    pictures=_pictures,
    groups={
        "mean": tuple(kind for kind in _KINDS if kind != "caption"),
        "existence": tuple(kind for kind in splits.EXISTENCE_KINDS if kind != "existence-counterfactual"),
    },
)
