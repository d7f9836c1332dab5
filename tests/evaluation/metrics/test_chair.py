from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.chair import Lexicon, chair
from mmefficient.evaluation.metrics.chair_coco import coco_lexicon
from mmefficient.evaluation.task import Output, Record

LEXICON = Lexicon(
    {
        "dog": ("dogs",),
        "hot dog": ("hot dogs",),
        "bus": ("buses",),
        "mouse": ("mice",),
        "sheep": ("sheep",),
        "scissors": ("pairs of scissors",),
        "light bulb": ("light bulbs",),
        "traffic light": ("traffic lights",),
        "bear": ("bears",),
        "teddy bear": ("teddy bears",),
    }
)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("A hot dog.", ["hot dog"]),
        ("A hot-dog, two dogs and three buses.", ["hot dog", "dog", "bus"]),
        ("a dog and another dog", ["dog", "dog"]),
        ("two pairs of scissors, a pair of scissors", ["scissors", "scissors"]),
        ("four mice among sheep", ["mouse", "sheep"]),
        ("a traffic light bulb", ["traffic light"]),  # overlapping names: the first takes its words
        ("traffic and light", []),
        ("dogma, busy, the dog's bed", []),
        ("A TEDDY bear; a bear!", ["teddy bear", "bear"]),
        ("", []),
    ],
)
def test_mentions(text: str, mentions: list[str]) -> None:
    assert LEXICON.mentions(text) == mentions


def test_scores_equal_those_computed_by_hand() -> None:
    cases = [
        # present, caption, hit the length limit: hallucinated/mentions, recalled/present
        (("dog", "bus"), "a dog, two buses and a hot dog.", False),  # 1/3, 2/2
        (("hot dog",), "a hot dog.", False),  # 0/1, 1/1
        (("sheep", "mouse", "dog"), "nothing.", False),  # 0/0, 0/3
        (("dog",), "a dog. a bear and a bear and a te", True),  # 0/1, 1/1: the unfinished sentence is dropped
        (("bus",), "a bear, " * 8 + "a bea", True),  # 8/8, 0/1: nothing finished, the last word is dropped
    ]
    records = [Record(str(i), "caption", "?", str(i), truth) for i, (truth, _, _) in enumerate(cases)]
    ratios = chair(LEXICON)(records, [Output(text, cut) for _, text, cut in cases])
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums == {
        "chair_s": (2, 5),
        "chair_i": (9, 13),
        "recall": (4, 8),
        "length": (8 + 3 + 1 + 10 + 18, 5),
        "repeated_8gram": (1, 5),
        "truncated": (2, 5),
        "without_objects": (1, 5),
    }
    assert ratios["length"].unit == "words"


GOLDEN = [
    # of 500 captions: hallucinated ones, hallucinated mentions, mentions, recalled, present; CHAIR_s, CHAIR_i, recall
    ((225, 478, 3739, 1216, 1524), (45.0, 12.8, 79.8)),  # LLaVA-1.5-7B: greedy, beam search, OPERA
    ((245, 523, 3763, 1213, 1524), (49.0, 13.9, 79.6)),
    ((224, 462, 3600, 1202, 1524), (44.8, 12.8, 78.9)),
    ((286, 496, 2184, 1066, 1548), (57.2, 22.7, 68.9)),  # InstructBLIP
    ((278, 609, 3936, 1151, 1548), (55.6, 15.5, 74.4)),
    ((228, 472, 3388, 1124, 1548), (45.6, 13.9, 72.6)),
    ((145, 233, 2522, 949, 1524), (29.0, 9.2, 62.3)),  # MiniGPT-4
    ((136, 199, 2267, 951, 1524), (27.2, 8.8, 62.4)),
    ((115, 175, 1999, 926, 1524), (23.0, 8.8, 60.8)),
    ((278, 573, 3694, 1184, 1524), (55.6, 15.5, 77.7)),  # Shikra
    ((248, 475, 3582, 1187, 1524), (49.6, 13.3, 77.9)),
    ((178, 313, 2597, 1045, 1524), (35.6, 12.1, 68.6)),
]


def shared(total: int, among: int, rows: int = 500) -> list[int]:
    """`total` spread evenly over the first `among` of `rows`."""
    return [total // among + (n < total % among) if n < among else 0 for n in range(rows)]


@pytest.mark.parametrize(("counts", "published"), GOLDEN)
def test_published_scores_follow_from_their_counts(counts: tuple[int, ...], published: tuple[float, ...]) -> None:
    """Captions are made so that the sums are those of OPERA's released answers, recounted; objects are COCO's."""
    captions, wrong, mentions, recalled, present = counts
    nodes = list(dict.fromkeys(coco_lexicon().nodes.values()))
    absent, there = nodes[:40], nodes[40:]
    records, outputs = [], []
    rows = zip(shared(wrong, captions), shared(mentions - wrong, 500), shared(recalled, 500), shared(present, 500),
               strict=True)  # fmt: skip
    for number, (bad, good, types, all_types) in enumerate(rows):
        named = [there[(number + n) % 40] for n in range(types)]
        truth = [there[(number + n) % 40] for n in range(all_types)]
        said = [named[n % types] for n in range(good)] + [absent[n % 40] for n in range(bad)]
        records.append(Record(str(number), "caption", "?", str(number), tuple(truth)))
        outputs.append(Output(f"There is {', '.join(f'a {word}' for word in said)}."))
    ratios = chair(coco_lexicon())(records, outputs)
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums["chair_s"] == (captions, 500)
    assert sums["chair_i"] == (wrong, mentions)
    assert sums["recall"] == (recalled, present)
    scores = [round(100 * sums[name][0] / sums[name][1], 1) for name in ("chair_s", "chair_i", "recall")]
    assert scores == list(published)
