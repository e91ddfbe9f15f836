"""A grid of pictures with a caption under each.

A caption is some lines of text, broken to the width of the picture; what does not fit into
`LINES` lines ends in dots. Pictures are enlarged, in whole steps, until a caption is legible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.data.image_grid import as_pictures
from fewstep.diffusion.pixels import to_uint8

CELL = 160
"""Pixels of a picture's longer side, at least."""
SIZE = 13
"""Of the letters, in pixels."""
LEADING = 17
"""Pixels from one line to the next."""
LINES = 3
"""Of a prompt, at most."""
GAP = 10
BACK, INK, FAINT = (24, 24, 24), (235, 235, 235), (150, 150, 150)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def letters(size: int) -> Font:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic and more; without
    matplotlib pillow's own letters, which are those of English."""
    found = find_spec("matplotlib")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)


def broken(text: str, font: Font, width: int, lines: int = LINES) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels; dots stand for a rest."""
    out, words = [""], text.split()
    while words:
        word = words.pop(0)
        joined = f"{out[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            out[-1] = joined
        elif out[-1]:
            words.insert(0, word)
            out.append("")
        else:  # a word of more than a line
            fits = max(1, sum(font.getlength(word[:n]) <= width for n in range(1, len(word) + 1)))
            out[-1] = word[:fits]
            words.insert(0, word[fits:])
        if len(out) > lines:
            return [*out[: lines - 1], _dotted(out[lines - 1], font, width)]
    return out


def _dotted(line: str, font: Font, width: int) -> str:
    """A line that goes on, with dots at its end."""
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def captioned_grid(
    x: Tensor, captions: Sequence[str], notes: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Samples (B, *) as pictures in rows of `columns`, with what was asked under each.

    Arguments:
        x: samples, shown as `as_pictures` shows them.
        captions: B texts, such as prompts; several lines each.
        notes: B further lines, such as "seed 3", in fainter letters.
        columns: by default as many as make the grid square.
    """
    pictures = to_uint8(as_pictures(x)).cpu().numpy()
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = max(1, math.ceil(CELL / max(height, width)))
    font = letters(SIZE)
    wide, high = max(width * scale, CELL), height * scale
    texts = [broken(caption, font, wide) for caption in captions]
    under = LEADING * (1 + max(map(len, texts))) + GAP // 2
    step_x, step_y = wide + GAP, high + under + GAP
    rows = math.ceil(count / columns)
    canvas = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), BACK)
    draw = ImageDraw.Draw(canvas)
    for place, picture in enumerate(pictures):
        left, top = GAP + place % columns * step_x, GAP + place // columns * step_y
        enlarged = np.asarray(picture).repeat(scale, 0).repeat(scale, 1)
        shown = Image.fromarray(enlarged[..., 0] if channels == 1 else enlarged)
        canvas.paste(shown, (left + (wide - width * scale) // 2, top))
        y = top + high + GAP // 2
        for line in texts[place]:
            draw.text((left, y), line, INK, font)
            y += LEADING
        draw.text((left, y), notes[place], FAINT, font)
    return canvas
