"""Make docs/images/digits.png from a finished demo: python tools/readme_picture.py runs/demo"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from fewstep import load_student
from fewstep.data import digits
from fewstep.data.image_grid import grid, png

OUT = Path(__file__).parent.parent / "docs" / "images" / "digits.png"
ROWS = 8


def main(run: Path) -> None:
    _, held_out = digits.load_digits()
    by_label = [held_out.x0[held_out.labels == c][:ROWS] for c in range(digits.CLASSES)]
    real = torch.stack(by_label, 1).flatten(0, 1)
    seeds = range(ROWS * digits.CLASSES)
    sets = [real, load_student(run / "teacher").sample(seeds), load_student(run).sample(seeds)]
    pictures = [grid(x, columns=digits.CLASSES, cell=24, gap=3) for x in sets]
    gap = 16
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("L", (width, pictures[0].height), 255)
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(png(canvas))
    print(OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
