"""Scenes without end: sample n of a stream is a caption and its picture, a function of n alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from examples.scenes.captions import Caption, Split, deck, split
from examples.scenes.draw import Objects, draw
from fewstep.diffusion.rng import Draws

OTHERS = 1
"""Seed of pictures that measure, and teach the judge; those of the teacher have its run's seed."""


@dataclass(frozen=True)
class Stream:
    """The learnt captions, half of them of one object, with a new picture each time."""

    split: Split = field(default_factory=split)
    objects: Objects = field(default_factory=Objects)

    @cached_property
    def decks(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `split.learnt`, singles and doubles, as often as they are drawn."""
        count = len(self.split.single)
        return deck(self.split.single), count + deck(self.split.double)

    def rows(self, draws: Draws) -> Tensor:
        """(B,) which of `split.learnt` the samples have."""
        one, two = (torch.from_numpy(rows) for rows in self.decks)
        u = draws.uniform("caption")
        first = one[(u * len(one)).long()]
        second = two[(u * len(two)).long()]
        return torch.where(draws.uniform("kind") < 0.5, first, second)

    def captions(self, draws: Draws) -> list[Caption]:
        """What the samples are called."""
        return [self.split.learnt[row] for row in self.rows(draws).tolist()]

    def pictures(self, first: int, count: int) -> Tensor:
        """Pictures (count, 3, 32, 32) of numbers that the teacher never sees."""
        draws = Draws.range(first, count, OTHERS)
        return draw(self.objects, self.captions(draws), draws)[0]
