"""A picture file as what a model starts from: read, checked, and brought to the model's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.errors import Unfit
from fewstep.data.images import FORMATS, decode, framed, pixels, standard
from fewstep.storage.bounded_reading import regular

MOST = 256 << 20
"""Bytes of a file."""


def read_start(path: Path, width: int, height: int, channels: int = 3) -> tuple[Tensor, list[str]]:
    """The picture in a file as (1, channels, height, width) in [-1, 1], and what was done to it.

    It is turned upright, laid on white where it is transparent, converted to grey or RGB, cut to
    these proportions in its middle and resized by Lanczos' filter; each of these is told as a
    sentence. ValueError where it is no picture of 8 bits, damaged, or too large to be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no picture {path} to start from")
    with regular(path) as file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"{path} is larger than {MOST >> 20} MiB")
    notes: list[str] = []
    try:
        image = decode(data, lambda what: notes.append(f"{path.name}: {what}"))
        plain = standard(image)
    except Unfit as error:
        text = str(error)
        known = ", ".join(FORMATS)
        why = f"not a whole picture; {known} are read" if text == "damaged" else text
        raise ValueError(f"{path} cannot be started from: it is {why}") from None
    if plain is not image:
        notes.append(f"{path.name} is converted from {image.mode} to {plain.mode}")
    mode = "RGB" if channels == 3 else "L"
    if plain.mode != mode:
        notes.append(f"{path.name} is converted from {plain.mode} to {mode}, as the model makes")
        plain = plain.convert(mode)
    notes += _resizing(plain, path.name, width, height)
    array = np.array(pixels(framed(plain, width, height)))
    x = torch.from_numpy(array).permute(2, 0, 1)[None]
    return x.float() / 127.5 - 1, notes


def _resizing(image: Image.Image, name: str, width: int, height: int) -> list[str]:
    """What `framed` does to a picture of another size."""
    if image.size == (width, height):
        return []
    cut = ", cut to its middle" if image.width * height != image.height * width else ""
    larger = min(image.width / width, image.height / height) < 1
    how = "enlarged" if larger else "reduced"
    return [
        f"{name} has {image.width}x{image.height} pixels and is {how} to {width}x{height}{cut}"
    ]
