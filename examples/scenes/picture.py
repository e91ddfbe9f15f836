"""A table of pictures: a row for each model, a column for each caption, its words above it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.scenes.scores import Exam
from examples.scenes.students import STUDENTS
from fewstep.data.image_grid import png
from fewstep.diffusion.pixels import to_uint8

SCALE, GAP, MARGIN, LINE = 2, 6, 205, 14
SHOWN = 5
"""Captions of seen pairs, and of unseen ones."""
TITLES = {
    "real": "drawn",
    "ddim 1": "teacher, 1 step",
    "ddim 4": "teacher, 4 steps",
    "ddim 4 guided": "teacher, 4 guided steps",
    "ddim 50 guided": "teacher, 50 guided steps",
    **{name: student.title for name, student in STUDENTS.items()},
}


def shown(asked: Exam) -> list[int]:
    """Numbers of the pictures that the table has, of the exam's."""
    starts = [(0, len(asked.seen)), (len(asked.seen), len(asked.unseen))]
    columns = [first + i for first, count in starts for i in range(min(SHOWN, count))]
    return [column * asked.repeats + i for column in columns for i in range(asked.repeats)]


def table(pictures: Mapping[str, Tensor], asked: Exam, out: Path) -> None:
    """Write a PNG; pictures: name -> (N, 3, 32, 32), those that are `shown`, two in a cell."""
    repeats = asked.repeats
    columns = shown(asked)[::repeats]
    captions = [asked.captions[row].text for row in columns]
    rows = {title: pictures[name] for name, title in TITLES.items() if name in pictures}
    side = SCALE * 32
    wide, tall = repeats * (side + 2) + 2 * GAP, side + GAP
    lines = [textwrap.wrap(caption, 21) for caption in captions]
    head = 10 + LINE * max(map(len, lines))
    size = (MARGIN + len(columns) * wide, head + len(rows) * tall)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for place, some in enumerate(lines):
        for line, text in enumerate(some):
            at = (MARGIN + place * wide + wide / 2 - GAP, 4 + LINE * line)
            pen.text(at, text, "black", font, "ma")
    for row, (title, x) in enumerate(rows.items()):
        top = head + row * tall
        pen.text((8, top + side / 2), title, "black", font, "lm")
        for place in range(len(columns)):
            cell = to_uint8(x[place * repeats : (place + 1) * repeats]).numpy()
            for repeat, picture in enumerate(cell):
                one = Image.fromarray(np.ascontiguousarray(picture))
                one = one.resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(one, (MARGIN + place * wide + repeat * (side + 2), top))
    out.write_bytes(png(canvas))
