"""Answers follow from the scene graph: every kind is checked against an independent reading of the objects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.questions import (
    ASK,
    ask_colour,
    ask_comparison,
    ask_count,
    ask_position,
    ask_relation,
    ask_two_hop,
    caption,
    cell,
    direction,
    training_question,
)
from mmefficient.models.reference.scenes.sample import Dice, Scene, Thing, sample_scene

INDEX = {cls.name: i for i, cls in enumerate(OBJECTS)}
NOWHERE = Scene((), None, (), (0,) * 8, "kitchen")


RELATIONS = {
    ("Where is the dog relative to the book?", "above"),
    ("Where is the book relative to the dog?", "below"),
    ("On which side of the book is the dog?", "above"),
    ("On which side of the dog is the book?", "below"),
    ("Is the dog above the book?", "yes"),
    ("Is the dog below the book?", "no"),
    ("Is the book below the dog?", "yes"),
    ("Is the book above the dog?", "no"),
}


def thing(name: str, x: float, y: float, variant: int = 0) -> Thing:
    """A 20 px object centred at (x, y)."""
    return Thing(INDEX[name], variant, 0, int(x) - 10, int(y) - 10, 20, 20)


def scene(*things: Thing) -> Scene:
    return replace(NOWHERE, things=things)


def test_cells_and_their_margin() -> None:
    assert cell(thing("dog", 50, 50)) == "top left"
    assert cell(thing("dog", 168, 168)) == "centre"
    assert cell(thing("dog", 168, 300)) == "bottom"
    assert cell(thing("dog", 300, 168)) == "right"
    assert cell(thing("dog", 114, 168)) is None


def test_directions_need_a_dominant_axis() -> None:
    origin = thing("cat", 160, 160)
    assert direction(thing("dog", 60, 150), origin) == "left"
    assert direction(thing("dog", 150, 260), origin) == "below"
    assert direction(thing("dog", 240, 230), origin) is None
    assert direction(thing("dog", 180, 160), origin) is None


def test_each_kind_on_a_known_scene() -> None:
    known = scene(thing("dog", 50, 50), thing("cat", 280, 60), thing("cat", 280, 280), thing("book", 50, 290, 2))
    colour = OBJECTS[INDEX["book"]].colours[2]
    for seed in range(30):
        count = ask_count(known, Dice(seed))
        assert count is not None
        assert count[1] == ("2" if "cats" in count[0] else "1")
        position = ask_position(known, Dice(seed))
        assert position is not None
        assert position[1] == ("top left" if "dog" in position[0] else "bottom left")
        relation = ask_relation(known, Dice(seed))
        assert relation is not None
        assert relation in RELATIONS
        comparison = ask_comparison(known, Dice(seed))
        assert comparison is not None
        assert (comparison[1] == "yes") == ("more cats" in comparison[0])
        assert ask_colour(known, Dice(seed)) in {
            (f"{start} {verb} {rest}", colour)
            for start, verb, rest in (("What colour", "is", "the book?"), ("Which colour", "does", "the book have?"))
        }
        two_hop = ask_two_hop(known, Dice(seed))
        assert two_hop is not None
        assert two_hop[1] in known.names


def test_two_hop_takes_the_nearest_and_refuses_a_tie() -> None:
    row = scene(thing("dog", 40, 160), thing("cat", 120, 160), thing("bus", 300, 160))
    answers = {ask_two_hop(row, Dice(seed)) for seed in range(80)}
    assert ("What is to the right of the dog?", "cat") in answers
    assert ("What is to the right of the cat?", "bus") in answers
    assert ("What is to the right of the dog?", "bus") not in answers
    tie = scene(thing("dog", 40, 160), thing("cat", 140, 150), thing("bus", 145, 175))
    assert all(qa is None or "right of the dog" not in qa[0] for qa in (ask_two_hop(tie, Dice(s)) for s in range(80)))


def test_captions() -> None:
    assert caption(scene(thing("dog", 20, 20))) == "a dog."
    pair = scene(thing("cat", 200, 20), thing("dog", 20, 20), thing("cat", 100, 20))
    assert caption(pair) == "a dog and two cats."
    assert caption(scene(thing("elephant", 20, 9), thing("dog", 50, 9), thing("bus", 90, 9))) == (
        "an elephant, a dog and a bus."
    )
    assert caption(scene()) == "nothing."


@pytest.mark.parametrize("kind", [kind for kind in ASK if kind != "caption"])
def test_an_empty_scene_supports_no_question(kind: str) -> None:
    assert ASK[kind](scene(), Dice(0)) is None


def test_training_existence_is_balanced_and_true() -> None:
    yes = 0
    for seed in range(600):
        dice = Dice(seed)
        some = sample_scene(dice)
        qa = training_question("existence-random", some, dice)
        assert qa is not None
        named = [c.name for c in OBJECTS if any(s in qa[0] for s in (f" {c.indefinite} ", f" {c.indefinite}?"))]
        assert (qa[1] == "yes") == any(name in some.names for name in named)
        yes += qa[1] == "yes"
    assert 0.42 < yes / 600 < 0.58
