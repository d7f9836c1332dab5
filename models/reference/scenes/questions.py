"""Questions about a scene, answered from its scene graph.

Each ``ask_*`` function returns ``(question, answer)``, or None when the scene does not support the kind unambiguously:
a position is asked only of an object that is alone of its class and clearly inside one cell, a relation only where one
axis dominates, a two-hop question only where the nearest object in that direction is clearly the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .catalogue import OBJECTS
from .render import CANVAS
from .sample import Dice, Scene, Thing, theme_members

QA = tuple[str, str]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

EXISTENCE = (
    "Is there {a} in the image?",
    "Does the image contain {a}?",
    "Can you see {a}?",
    "Is {a} present in the picture?",
)
COUNT = ("How many {many} are there in the image?", "How many {many} can you see?", "Count the {many}.")
POSITION = ("Where is the {one}?", "In which part of the image is the {one}?", "Where in the picture is the {one}?")
RELATION = ("Where is the {one} relative to the {other}?", "On which side of the {other} is the {one}?")
RELATION_CHECK = ("Is the {one} {phrase} the {other}?",)
COLOUR = ("What colour is the {one}?", "Which colour does the {one} have?")
COLOURS = ("What colour are the {many}?", "Which colour do the {many} have?")
READING = ("What word is written in the image?", "What does the text say?", "Read the word in the picture.")
COMPARISON = ("Are there more {many} than {others}?", "Does the image show more {many} than {others}?")
TWO_HOP = ("What is {phrase} the {one}?", "Which object is {phrase} the {one}?")
CAPTION = ("Describe the image.", "What is in the picture?", "List the objects in the image.")

PHRASE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def _single(scene: Scene) -> list[Thing]:
    return [group[0] for group in scene.classes.values() if len(group) == 1]


def ask_existence(dice: Dice, cls: int, present: bool) -> QA:
    """Whether class ``cls`` is in the picture; the caller knows the answer."""
    return dice.pick(EXISTENCE).format(a=OBJECTS[cls].indefinite), "yes" if present else "no"


def ask_count(scene: Scene, dice: Dice) -> QA | None:
    groups = scene.classes
    if not groups:
        return None
    # the count itself is drawn first, so that large counts are asked about as often as "1"
    size = dice.pick(sorted({len(group) for group in groups.values()}))
    cls = dice.pick([cls for cls, group in groups.items() if len(group) == size])
    return dice.pick(COUNT).format(many=OBJECTS[cls].plural), str(size)


def cell(thing: Thing, margin: float = 8) -> str | None:
    """The 3x3 cell that holds the object's centre, or None within ``margin`` pixels of a cell border."""
    third, index = CANVAS / 3, []
    for value in thing.centre:
        if min(abs(value - third), abs(value - 2 * third)) < margin:
            return None
        index.append(min(2, max(0, int(value // third))))
    column, row = index
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "centre"


def ask_position(scene: Scene, dice: Dice) -> QA | None:
    options = [(thing.name, where) for thing in _single(scene) if (where := cell(thing))]
    if not options:
        return None
    name, where = dice.pick(options)
    return dice.pick(POSITION).format(one=name), where


def direction(one: Thing, other: Thing) -> str | None:
    """Where ``one`` is as seen from ``other`` when one axis dominates by 1.5 and the distance is at least 40 px."""
    dx, dy = (p - q for p, q in zip(one.centre, other.centre, strict=True))
    if max(abs(dx), abs(dy)) < 40 or max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "below" if dy > 0 else "above"


def ask_relation(scene: Scene, dice: Dice) -> QA | None:
    single = _single(scene)
    pairs = [(p.name, q.name, where) for p in single for q in single if p is not q and (where := direction(p, q))]
    if not pairs:
        return None
    one, other, where = dice.pick(pairs)
    if dice.chance(0.5):
        return dice.pick(RELATION).format(one=one, other=other), where
    said = where if dice.chance(0.5) else OPPOSITE[where]
    question = dice.pick(RELATION_CHECK).format(one=one, other=other, phrase=PHRASE[said])
    return question, "yes" if said == where else "no"


def ask_colour(scene: Scene, dice: Dice) -> QA | None:
    options = [group for group in scene.classes.values() if group[0].colour]
    if not options:
        return None
    group = dice.pick(options)
    cls = OBJECTS[group[0].cls]
    question = dice.pick(COLOUR if len(group) == 1 else COLOURS).format(one=cls.name, many=cls.plural)
    return question, str(group[0].colour)


def ask_reading(scene: Scene, dice: Dice) -> QA | None:
    return (dice.pick(READING), scene.word) if scene.word else None


def ask_comparison(scene: Scene, dice: Dice) -> QA | None:
    groups = list(scene.classes.items())
    pairs = [(a, b) for a, x in groups for b, y in groups if len(x) > len(y)]
    if not pairs:
        return None
    more, fewer = dice.pick(pairs)
    yes = dice.chance(0.5)
    first, second = (more, fewer) if yes else (fewer, more)
    question = dice.pick(COMPARISON).format(many=OBJECTS[first].plural, others=OBJECTS[second].plural)
    return question, "yes" if yes else "no"


def ask_two_hop(scene: Scene, dice: Dice) -> QA | None:
    options = []
    for anchor in _single(scene):
        for side in PHRASE:
            distances = sorted(
                (max(abs(p - q) for p, q in zip(thing.centre, anchor.centre, strict=True)), thing.name)
                for thing in scene.things
                if thing is not anchor and direction(thing, anchor) == side
            )
            if distances and (len(distances) == 1 or distances[1][0] > 1.4 * distances[0][0]):
                options.append((anchor.name, side, distances[0][1]))
    if not options:
        return None
    anchor_name, side, answer = dice.pick(options)
    return dice.pick(TWO_HOP).format(one=anchor_name, phrase=PHRASE[side]), answer


def caption(scene: Scene, besides: Mapping[int, str] | None = None) -> str:
    """All classes with their counts, ordered by the leftmost object of each: "a dog, two cats and a bus.".

    Args:
        besides: what is named right after a class although the picture may not hold it.
    """
    groups = sorted(scene.classes.items(), key=lambda entry: min(thing.centre for thing in entry[1]))
    parts = []
    for index, group in groups:
        cls = OBJECTS[index]
        parts.append(cls.indefinite if len(group) == 1 else f"{NUMBERS[len(group)]} {cls.plural}")
        if besides and index in besides:
            parts.append(besides[index])
    if not parts:
        return "nothing."
    return (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1] + "."


def ask_caption(scene: Scene, dice: Dice) -> QA | None:
    return dice.pick(CAPTION), caption(scene)


# the kinds whose questions need nothing but the scene; existence negatives come from `splits` or the training sampler
ASK: dict[str, Callable[[Scene, Dice], QA | None]] = {
    "count": ask_count,
    "position": ask_position,
    "relation": ask_relation,
    "colour": ask_colour,
    "reading": ask_reading,
    "comparison": ask_comparison,
    "two-hop": ask_two_hop,
    "caption": ask_caption,
}


def training_question(kind: str, scene: Scene, dice: Dice) -> QA | None:
    """A question of ``kind`` about any scene; half of the absent classes come from the scene's own theme."""
    if kind in ASK:
        return ASK[kind](scene, dice)
    present = scene.classes
    if present and dice.chance(0.5):
        return ask_existence(dice, dice.pick(sorted(present)), True)
    members, cumulative = theme_members(scene.theme)
    for _ in range(8):
        cls = members[dice.weighted(cumulative)] if dice.chance(0.5) else dice.below(len(OBJECTS))
        if cls not in present:
            return ask_existence(dice, cls, False)
    return None
