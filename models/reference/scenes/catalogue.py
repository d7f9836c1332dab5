"""What a scene can contain: object classes by theme, their sprites, clutter marks and printable words.

A class is in the list only if its emoji shows that object and nothing that another class names (so there is a
``bird`` and no ``duck``), and can be told from every other sprite at 24 px. COCO names are used where COCO has the
class. A sprite id is an index into ``SPRITES``; a word id is an index into ``WORDS``.
"""

from __future__ import annotations

from typing import NamedTuple

THEMES: tuple[str, ...] = (
    "kitchen", "market", "street", "farm", "savanna", "sea", "sky", "office", "music", "winter", "garden", "home",
    "party", "sport",
)  # fmt: skip


class Sprite(NamedTuple):
    """One emoji and the turn of its hue in 1/256 of the colour circle (0 leaves the emoji as the font draws it)."""

    emoji: str
    hue: int = 0


class ObjectClass(NamedTuple):
    """One kind of object; ``sprites`` is parallel to ``colours``, or one sprite long where colour does not apply."""

    name: str
    plural: str
    themes: tuple[str, ...]
    colours: tuple[str, ...]
    sprites: tuple[int, ...]

    @property
    def indefinite(self) -> str:
        """The class with its indefinite article: "a dog", "an apple", "a pair of scissors"."""
        if self.plural.startswith("pairs of "):
            return f"a pair of {self.name}"
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


# name | themes | one emoji, or colour=emoji with an optional turn of the hue (+n/256) | plural unless name + "s"
_TABLE = """
bottle | kitchen party | 🍾
wine glass | kitchen party | 🍷 | wine glasses
cup | kitchen office | ☕
knife | kitchen | 🔪 | knives
spoon | kitchen | 🥄
bowl | kitchen | 🥣
sandwich | kitchen | 🥪 | sandwiches
hot dog | kitchen sport | 🌭
pizza | kitchen party | 🍕
donut | kitchen office | 🍩
burger | kitchen | 🍔
bread | kitchen market | 🍞
cheese | kitchen market | 🧀
egg | kitchen farm | 🥚
banana | market | 🍌
apple | market | red=🍎 green=🍏
orange | market | 🍊
broccoli | market garden | 🥦
carrot | market garden | 🥕
lemon | market kitchen | 🍋
strawberry | market garden | 🍓 | strawberries
pineapple | market | 🍍
watermelon | market | 🍉
eggplant | market | 🍆
person | street sport | 🧍 | people
bicycle | street sport | 🚲
car | street | red=🚗 yellow=🚗+40 green=🚗+90 blue=🚗+155 purple=🚗+190
motorcycle | street | 🏍
bus | street | 🚌 | buses
train | street | 🚂
truck | street farm | 🚚
traffic light | street | 🚦
scooter | street | 🛴
handbag | street home | 👜
suitcase | street home | 🧳
backpack | street office | red=🎒 yellow=🎒+36 green=🎒+90 blue=🎒+155 purple=🎒+190
horse | farm | 🐎
sheep | farm | 🐑 | sheep
cow | farm | 🐄
pig | farm | 🐖
goat | farm | 🐐
dog | farm home | 🐕
cat | farm home | 🐈
rabbit | farm garden | 🐇
tractor | farm | 🚜
elephant | savanna | 🐘
zebra | savanna | 🦓
giraffe | savanna | 🦒
lion | savanna | 🦁
tiger | savanna | 🐅
monkey | savanna | 🐒
camel | savanna | 🐪
kangaroo | savanna | 🦘
crocodile | savanna sea | 🐊
boat | sea | ⛵
fish | sea | 🐟 | fish
whale | sea | 🐳
octopus | sea | 🐙 | octopuses
crab | sea | 🦀
turtle | sea | 🐢
anchor | sea | ⚓
airplane | sky | ✈
helicopter | sky | 🚁
rocket | sky | 🚀
kite | sky sport | 🪁
bird | sky garden | 🐦
sun | sky sea | ☀
moon | sky | 🌙
star | sky party | ⭐
cloud | sky | ☁
rainbow | sky | 🌈
umbrella | street sea | ☂
laptop | office home | 💻
mouse | office | 🖱 | mice
keyboard | office | ⌨
cell phone | office home | 📱
book | office home | red=📕 yellow=📙+8 green=📗 blue=📘
clock | office home | ⏰
scissors | office | ✂ | pairs of scissors
pencil | office | ✏
light bulb | office home | 💡
square | office music | red=🟥 yellow=🟨 green=🟩 blue=🟦 purple=🟪 brown=🟫 black=⬛ white=⬜
guitar | music party | 🎸
piano | music home | 🎹
drum | music | 🥁
violin | music | 🎻
saxophone | music | 🎷
accordion | music | 🪗
microphone | music party | 🎤
radio | music home | 📻
bell | music winter | 🔔
camera | music party | 📷
bear | winter | 🐻
fox | winter | 🦊 | foxes
snowman | winter | ⛄ | snowmen
snowflake | winter | ❄
sled | winter | 🛷
ice skate | winter sport | ⛸
scarf | winter | 🧣 | scarves
mountain | winter | 🏔
tree | garden farm | 🌳
cactus | garden savanna | 🌵 | cacti
mushroom | garden | 🍄
sunflower | garden farm | 🌻
rose | garden party | 🌹
pumpkin | garden farm | 🎃
frog | garden | 🐸
butterfly | garden | 🦋 | butterflies
bee | garden | 🐝
ladybug | garden | 🐞
snail | garden | 🐌
chair | home | 🪑
couch | home | 🛋 | couches
potted plant | home office | 🪴
bed | home | 🛏
toilet | home | 🚽
tv | home | 📺
vase | home | 🏺
teddy bear | home party | 🧸
toothbrush | home | 🪥 | toothbrushes
bathtub | home | 🛁
door | home | 🚪
window | home | 🪟
broom | home | 🧹
key | home | 🔑
lock | home | 🔒
hammer | home farm | 🔨
ladder | farm | 🪜
house | farm street | 🏠
castle | sea garden | 🏰
tent | savanna winter | ⛺
cake | party kitchen | 🎂
ice cream | party sea | 🍦
cupcake | party | 🧁
balloon | party sky | red=🎈 yellow=🎈+36 green=🎈+85 blue=🎈+150 purple=🎈+190
gift | party winter | 🎁
candle | party | 🕯
crown | party | 👑
hat | party | 🎩
dress | party | red=👗+110 green=👗+190 blue=👗 purple=👗+55 | dresses
heart | party | red=❤ yellow=💛 green=💚 blue=💙 purple=💜 brown=🤎 black=🖤 white=🤍
sports ball | sport | ⚽
frisbee | sport | 🥏
skateboard | sport | 🛹
boxing glove | sport | 🥊
target | sport | 🎯
shirt | sport | 👕
shoe | sport | 👟
trophy | sport office | 🏆 | trophies
circle | sport | red=🔴 yellow=🟡 green=🟢 blue=🔵 purple=🟣 brown=🟤 black=⚫ white=⚪
"""

# Marks that are no object, so that not everything drawn is to be named.
_CLUTTER = "➕✖➗❓❗⁉✔✳💲〰➰➿♻⚕💢"

# No class, plural, theme, colour, number or direction, nor a word of one; no J or Q, which hang below the line.
_WORDS = """
able actor again agree alarm also angel angry answer april arrow aunt autumn away baby badge bank beach
begin bonus brave brief bring busy buy calm camp cash change cheap circus class clever club coast cook cool
corner dance daring dear desk diary dinner doctor dollar dozen dream dust early earth easy echo edge elbow
empty energy event exit fable fact family famous film fly focus folk forest free friend fuel fun future game
gate gentle giant glad goal good grand guest guide habit happy hello hero hobby honest hotel hour humble
idea inch invite island item keen kid kind king kiss lake laugh lazy legend lesson logic lucky lunch magic
maybe meal menu merry metal milk mind modern money movie myth name navy never nice noble novel oasis offer
often oil open oven palace paper peace pilot planet poem polite prize proud puzzle ranch reason relax rich
river safe salt school secret silent simple smile soft song spark story sugar sweet talent task team thank
tiny today travel trust ugly uncle union upset urban usual valley velvet very video visit vivid voice walk
warm water wealth week wild wise wonder world worth wrong yard year young youth zone zoom
"""


class _Row(NamedTuple):
    name: str
    themes: tuple[str, ...]
    looks: tuple[tuple[str, Sprite], ...]
    plural: str


def _parse(line: str) -> _Row:
    name, themes, looks, *plural = (part.strip() for part in line.split("|"))
    pairs = []
    for look in looks.split():
        colour, _, drawing = look.rpartition("=")
        emoji, _, hue = drawing.partition("+")
        pairs.append((colour, Sprite(emoji, int(hue or 0))))
    return _Row(name, tuple(themes.split()), tuple(pairs), plural[0] if plural else f"{name}s")


def _build() -> tuple[tuple[ObjectClass, ...], tuple[Sprite, ...], tuple[int, ...]]:
    objects: list[ObjectClass] = []
    sprites: list[Sprite] = []
    for row in map(_parse, _TABLE.strip().splitlines()):
        first = len(sprites)
        sprites.extend(sprite for _, sprite in row.looks)
        colours = tuple(colour for colour, _ in row.looks if colour)
        objects.append(ObjectClass(row.name, row.plural, row.themes, colours, tuple(range(first, len(sprites)))))
    marks = tuple(range(len(sprites), len(sprites) + len(_CLUTTER)))
    sprites.extend(map(Sprite, _CLUTTER))
    return tuple(objects), tuple(sprites), marks


OBJECTS, SPRITES, CLUTTER = _build()
WORDS: tuple[str, ...] = tuple(_WORDS.split())
COLOURS: tuple[str, ...] = tuple(sorted({colour for kind in OBJECTS for colour in kind.colours}))
