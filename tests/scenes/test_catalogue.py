from __future__ import annotations

import re
from collections import Counter

from mmefficient.models.reference.scenes.catalogue import CLUTTER, COLOURS, OBJECTS, SPRITES, THEMES, WORDS

COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, bird, cat, dog, horse,
sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, suitcase, frisbee, sports ball, kite,
skateboard, bottle, wine glass, cup, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, toilet, tv, laptop, mouse, keyboard, cell phone, book, clock, vase,
scissors, teddy bear, toothbrush"""
NUMBERS_AND_DIRECTIONS = """zero one two three four five six seven eight nine ten no yes left right above below top
bottom middle centre center up down under over north south east west"""


def test_classes_and_plurals_are_unique_and_use_coco_names() -> None:
    names = [kind.name for kind in OBJECTS]
    plurals = [kind.plural for kind in OBJECTS]
    assert len(OBJECTS) >= 110
    assert len(set(names)) == len(names)
    assert len(set(plurals)) == len(plurals)
    for kind in OBJECTS:
        others = {other.name for other in OBJECTS if other is not kind}
        assert kind.plural not in others
    assert set(re.split(r",\s", COCO)) <= set(names)


def test_every_theme_has_enough_classes_and_every_class_one_or_two_themes() -> None:
    count = Counter(theme for kind in OBJECTS for theme in kind.themes)
    assert set(count) == set(THEMES)
    assert min(count.values()) >= 8
    assert all(1 <= len(set(kind.themes)) == len(kind.themes) <= 2 for kind in OBJECTS)


def test_sprites_belong_to_one_class_each_and_run_parallel_to_colours() -> None:
    used = [sprite for kind in OBJECTS for sprite in kind.sprites] + list(CLUTTER)
    assert used == list(range(len(SPRITES)))
    assert len(set(SPRITES)) == len(SPRITES)
    for kind in OBJECTS:
        assert len(kind.sprites) == max(1, len(kind.colours))
        assert len(set(kind.colours)) == len(kind.colours) != 1
    assert sum(len(kind.colours) >= 4 for kind in OBJECTS) >= 4
    assert set(COLOURS) == {colour for kind in OBJECTS for colour in kind.colours}


def test_sprites_are_single_characters() -> None:
    """One code point each: no joiner or variation selector, so drawing needs no text shaping."""
    assert all(len(sprite.emoji) == 1 for sprite in SPRITES)


def test_words_are_short_and_share_nothing_with_what_questions_speak_of() -> None:
    assert len(set(WORDS)) == len(WORDS) == 200
    assert all(3 <= len(word) <= 6 and word.isascii() and word.islower() and word.isalpha() for word in WORDS)
    phrases = [kind.name for kind in OBJECTS] + [kind.plural for kind in OBJECTS]
    spoken = " ".join([*phrases, *THEMES, *COLOURS, NUMBERS_AND_DIRECTIONS]).split()
    assert not set(WORDS) & set(spoken)


def test_indefinite_phrases() -> None:
    phrases = {kind.name: kind.indefinite for kind in OBJECTS}
    assert phrases["dog"] == "a dog"
    assert phrases["umbrella"] == "an umbrella"
    assert phrases["scissors"] == "a pair of scissors"
