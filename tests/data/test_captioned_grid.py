"""Captions under pictures: lines that fit, and pictures that are not touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.captioned_grid import BACK, CELL, GAP, LEADING, broken, captioned_grid, letters
from fewstep.diffusion.pixels import to_uint8

FONT = letters(13)


def test_lines_fit_and_lose_nothing_unsaid() -> None:
    """Whole where it fits; else the lines are full, and end in dots."""
    text = "a small red fox at the left on blue and a cat above"
    lines = broken(text, FONT, 160)
    assert " ".join(lines) == text
    assert len(lines) > 1
    assert all(FONT.getlength(line) <= 160 for line in lines)
    long = broken("word " * 60, FONT, 160)
    assert len(long) == 3
    assert long[-1].endswith("...")
    assert all(100 < FONT.getlength(line) <= 160 for line in long)
    endless = broken("x" * 500, FONT, 160)
    assert len(endless) == 3
    assert all(FONT.getlength(line) <= 160 for line in endless)
    assert broken("", FONT, 160) == [""]


def test_pictures_are_whole_and_captions_below() -> None:
    """In rows of two: enlarged pixels to the bit, ink under each, and none over a picture."""
    x = torch.rand(3, 3, 8, 16) * 2 - 1
    made = np.asarray(captioned_grid(x, ["a fox", "a cat " * 30, ""], ["seed 1"] * 3, 2))
    scale = CELL // 16
    high, wide = 8 * scale, 16 * scale
    step = high + LEADING * 4 + GAP // 2 + GAP
    for place, picture in enumerate(to_uint8(x).numpy()):
        top, left = GAP + place // 2 * step, GAP + place % 2 * (wide + GAP)
        cell = made[top : top + high, left : left + wide]
        assert np.array_equal(cell, picture.repeat(scale, 0).repeat(scale, 1))
        below = made[top + high : top + step - GAP, left : left + wide]
        assert (below != BACK).any(-1).any()
    grey = np.asarray(captioned_grid(torch.zeros(1, 1, 4, 4), ["a"], ["seed 0"]))
    assert grey.shape[2] == 3


def test_letters_of_other_tongues() -> None:
    """Each has a shape of its own, where matplotlib's font is there; boxes are all alike."""
    pytest.importorskip("matplotlib")
    shapes = {bytes(letters(20).getmask(letter)) for letter in "aüèßжλ"}
    assert len(shapes) == 6
