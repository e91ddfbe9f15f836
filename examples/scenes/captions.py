"""What is asked for: an object with its size and place, or two objects, on a colour.

    a small fox at the left on blue          a cat above a star on red

An eighth of the pairs object-colour and of the pairs object-object occurs in no caption that is
learnt: they are "unseen". Of the other captions some are laid aside, to choose settings by
("validation") and to report ("seen").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

WORDS = (
    *("cat", "dog", "fox", "panda", "pig", "cow", "rabbit", "monkey", "frog", "penguin", "owl"),
    *("fish", "whale", "butterfly", "turtle", "apple", "lemon", "strawberry", "pizza", "mushroom"),
    *("carrot", "doughnut", "house", "car", "bus", "rocket", "star", "heart", "tree"),
    *("sunflower", "crown", "guitar"),
)
"""What objects are called; the file of pictures has one to three emoji of each."""
COLOURS = {
    "red": (205, 60, 60),
    "orange": (238, 145, 60),
    "yellow": (240, 215, 90),
    "green": (80, 165, 90),
    "blue": (75, 125, 215),
    "purple": (140, 85, 185),
    "pink": (245, 170, 200),
    "grey": (150, 152, 158),
}
"""Background -> its mean colour, 0 to 255."""
SIZES = {"": (12, 25), "small": (12, 15), "large": (21, 25)}
"""What is said of a size -> the sides of the object, in pixels of 32, the first and the last."""
PLACES = ("", "at the left", "at the right", "at the top", "at the bottom", "in the middle")
RELATIONS = ("above", "left of")
ASIDE = 8
"""One in so many pairs is unseen."""
SAID = 5
"""A place is unsaid as often as all places are said: so many are there."""


@dataclass(frozen=True)
class Caption:
    """One scene: `second` is -1 for a single object, whose `relation` then is unused."""

    first: int
    """Number of its word in `WORDS`."""
    colour: int
    """Number of its background in `COLOURS`."""
    second: int = -1
    size: str = ""
    place: str = ""
    relation: str = ""

    @property
    def text(self) -> str:
        """As it is written."""
        name = f"{self.size} {WORDS[self.first]}".strip()
        on = f"on {tuple(COLOURS)[self.colour]}"
        if self.second < 0:
            return " ".join(f"{article(name)} {name} {self.place} {on}".split())
        other = WORDS[self.second]
        return f"{article(name)} {name} {self.relation} {article(other)} {other} {on}"

    @property
    def objects(self) -> tuple[int, ...]:
        """Numbers of its words."""
        return (self.first,) if self.second < 0 else (self.first, self.second)

    @property
    def weight(self) -> int:
        """How often it is drawn beside the others of its kind."""
        if self.second >= 0:
            return 1
        return (1 if self.size else 2) * (1 if self.place else SAID)


def article(name: str) -> str:
    """a or an."""
    return "an" if name[0] in "aeiou" else "a"


def singles() -> list[Caption]:
    """Every caption of one object."""
    every = range(len(WORDS)), range(len(COLOURS))
    return [
        Caption(first, colour, size=size, place=place)
        for first in every[0]
        for colour in every[1]
        for size in SIZES
        for place in PLACES
    ]


def doubles() -> list[Caption]:
    """Every caption of two different objects."""
    return [
        Caption(first, colour, second, relation=relation)
        for first in range(len(WORDS))
        for second in range(len(WORDS))
        if first != second
        for colour in range(len(COLOURS))
        for relation in RELATIONS
    ]


def unseen_colours() -> set[tuple[int, int]]:
    """Pairs (word, colour) that are not learnt: one colour of each word, each as often."""
    order = np.random.default_rng(0).permutation(len(WORDS))
    return {(int(word), place % len(COLOURS)) for place, word in enumerate(order)}


def unseen_objects() -> set[frozenset[int]]:
    """Pairs of words that are not learnt, an eighth of them, in either order."""
    pairs = [frozenset((a, b)) for b in range(len(WORDS)) for a in range(b)]
    order = np.random.default_rng(1).permutation(len(pairs))
    return {pairs[i] for i in order[: len(pairs) // ASIDE]}


@dataclass(frozen=True)
class Split:
    """All captions, by what they are for; each list is in an order of its own, shuffled."""

    single: Sequence[Caption]
    """Learnt, one object."""
    double: Sequence[Caption]
    """Learnt, two objects."""
    validation: Sequence[Caption]
    """Of pairs that are learnt, but not learnt themselves: settings are chosen on them."""
    seen: Sequence[Caption]
    """Likewise: results are reported on them."""
    unseen: Sequence[Caption]
    """With a pair that is in no other list."""

    @cached_property
    def learnt(self) -> list[Caption]:
        """All that the teacher hears."""
        return [*self.single, *self.double]


def split(limit: int = 0) -> Split:
    """The captions of this example: always the same ones; limit: of each list so many at most.

    Validation, seen and unseen alternate between one object and two.
    """
    colours, objects = unseen_colours(), unseen_objects()
    generator = np.random.default_rng(2)
    kinds = []
    for every in (singles(), doubles()):
        every = [every[i] for i in generator.permutation(len(every))]
        new = [c for c in every if strange(c, colours, objects)]
        old = [c for c in every if not strange(c, colours, objects)]
        some, more = len(old) // 16, len(old) // 16 + len(old) // ASIDE
        kinds.append((old[more:], old[:some], old[some:more], new))
    (one, *first), (two, *second) = kinds
    mixed = [
        [caption for pair in zip(a, b, strict=False) for caption in pair]
        for a, b in zip(first, second, strict=True)
    ]
    return Split(*(some[: limit or None] for some in (one, two, *mixed)))


def everything() -> Split:
    """All captions, unseen pairs too, as if they were learnt: what the judge must know."""
    return Split(singles(), doubles(), (), (), ())


def strange(caption: Caption, colours: set[tuple[int, int]], objects: set[frozenset[int]]) -> bool:
    """Whether it has a pair that is not learnt."""
    coloured = any((word, caption.colour) in colours for word in caption.objects)
    return coloured or frozenset(caption.objects) in objects


def deck(captions: Sequence[Caption]) -> np.ndarray:
    """Numbers of captions, each as often as its weight says: (rows,) int64."""
    return np.repeat(np.arange(len(captions)), [caption.weight for caption in captions])
