"""The fixed question sets: their hashes, sizes and POPE's rules for absent classes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmefficient.errors import InputError
from mmefficient.models.reference.scenes import splits
from mmefficient.models.reference.scenes.catalogue import OBJECTS

DIGESTS = {
    "test": "5225a11cf4836b903b55a9fd8d18597cb178e377c7d25eabf5ad4500c1577aa3",
    "confirm": "577a6d5455574e6a3c1cef548455e74fd72806f199b3cb50cc10abad50f54a0f",
    "val": "4d123f637db3c8b53888ff335a6e7ce7ca54550de2a0f0a34db90ecdf488e1d9",
}


@pytest.mark.parametrize("split", splits.SPLITS)
def test_questions_are_fixed_for_good(split: str) -> None:
    assert splits.digest(split) == DIGESTS[split]


def test_sizes_and_ids() -> None:
    questions = splits.load("test")
    sizes = Counter(q.kind for q in questions)
    assert set(sizes) == set(splits.KINDS)
    assert all(n == (1000 if kind == "caption" else 2000) for kind, n in sizes.items())
    assert len({q.id for q in questions}) == len(questions)
    assert all(q.answer in q.accepted for q in questions)


def test_a_limit_takes_the_first_questions() -> None:
    few = splits.load("test", ["count", "existence-popular"], limit=5)
    assert [q.id for q in few] == [f"test/{kind}/{i}" for kind in ("count", "existence-popular") for i in range(5)]
    assert few[0] == splits.load("test", ["count"])[0]


@pytest.mark.parametrize("kind", splits.EXISTENCE_KINDS)
def test_existence_is_balanced_and_follows_pope(kind: str) -> None:
    questions = splits.load("val", [kind])
    frequency, together = splits.statistics("val")
    by_picture: dict[str, list[splits.Question]] = {}
    for question in questions:
        by_picture.setdefault(question.source, []).append(question)
    for group in by_picture.values():
        if len(group) < 2 * splits.PER_PICTURE:
            continue
        assert Counter(q.answer for q in group) == {"yes": 3, "no": 3}
        present = set(group[0].scene.classes)
        asked = {
            i for i, c in enumerate(OBJECTS) for q in group if q.answer == "no" and f" {c.indefinite}" in q.text[:-1]
        }
        absent = [i for i in range(len(OBJECTS)) if i not in present]
        if kind == "existence-random":
            continue
        score = frequency if kind == "existence-popular" else together[sorted(present)].sum(0)
        best = sorted(score[absent])[-splits.PER_PICTURE :]
        assert set(best) <= set(score[sorted(asked)])


def test_statistics_count_pictures() -> None:
    frequency, together = splits.statistics("val")
    assert (np.diag(together) == 0).all()
    assert (together == together.T).all()
    assert (together <= np.minimum(frequency[:, None], frequency[None])).all()


def test_pictures_are_rgb_of_the_models_size() -> None:
    question = splits.load("val", ["reading"], limit=1)[0]
    assert question.image().size == (336, 336)
    assert question.image().mode == "RGB"
    assert question.image().tobytes() == splits.picture(question.scene).tobytes()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="split"):
        splits.load("train")
    with pytest.raises(InputError, match="kind"):
        splits.load("test", ["smell"])
