"""A table of pictures: a row for each model, a column for each prompt, its words above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.data.image_grid import png
from fewstep.diffusion.pixels import to_uint8

SCALE, GAP, MARGIN, HEAD, LINE = 2, 6, 190, 46, 15


def table(rows: Mapping[str, Tensor], captions: Sequence[str], out: Path) -> None:
    """Write a PNG of rows: title -> (captions, R, 3, H, W) in [-1, 1], R pictures in a cell."""
    side = SCALE * next(iter(rows.values())).shape[-1]
    tall = [GAP + GAP // 2 + x.shape[1] * (side + 2) for x in rows.values()]
    wide = side + GAP + 12
    size = (MARGIN + len(captions) * wide, HEAD + sum(tall))
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for place, caption in enumerate(captions):
        for line, word in enumerate(caption.split(" ", 1)):
            at = (MARGIN + place * wide + side / 2, 8 + LINE * line)
            draw.text(at, word, "black", font, "ma")
    top = HEAD
    for (title, x), height in zip(rows.items(), tall, strict=True):
        draw.text((8, top + height / 2), title, "black", font, "lm")
        for place, cell in enumerate(x):
            for repeat, picture in enumerate(to_uint8(cell).numpy()):
                shown = Image.fromarray(np.ascontiguousarray(picture))
                shown = shown.resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(shown, (MARGIN + place * wide, top + repeat * (side + 2)))
        top += height
    out.write_bytes(png(canvas))
