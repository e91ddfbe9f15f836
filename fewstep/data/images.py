"""Picture files: PNG, JPEG and WebP, bounded before they are decoded; crop and resize."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from fewstep.data.problems import Unfit

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
PIXELS = 64 << 20
"""Pixels of one picture; a file of a few bytes can declare billions."""

Crop = Literal["center", "dhariwal"]


def peek(data: bytes) -> Image.Image:
    """The picture, its header read and its size bounded, not decoded; `Unfit` says why not."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Unfit(_oversized()) from None
    except Exception:  # the decoders raise many kinds
        raise Unfit("damaged") from None
    if image.width * image.height > PIXELS:
        raise Unfit(_oversized(), f"{image.width}x{image.height}")
    return image


def _oversized() -> str:
    return f"larger than {PIXELS >> 20} megapixels"


def decode(data: bytes) -> Image.Image:
    """The whole picture; `Unfit` where it is damaged or oversized.

    A PNG's checksums are compared too: its pixels can come out of a file that is cut short.
    """
    image = peek(data)
    try:
        if image.format == "PNG":
            image.verify()  # after which it must be opened anew
            image = peek(data)
        image.load()
    except Exception:  # as above
        raise Unfit("damaged") from None
    return image


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 of a grey (C = 1) or RGB (C = 3) picture; others are `Unfit`."""
    if image.mode not in ("L", "RGB"):
        raise Unfit("neither grey nor RGB", image.mode)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def standard(image: Image.Image) -> Image.Image:
    """Grey or RGB of any kind of picture: what is transparent lies on white.

    16-bit and floating-point pictures are `Unfit`: which range they use is not known.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith(("I", "F")):
        raise Unfit("of more than 8 bits", image.mode)
    if image.mode == "1":
        return image.convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        image = Image.alpha_composite(white, over)
    return image.convert("RGB")


def fit(image: Image.Image, size: int, crop: Crop = "center") -> Image.Image:
    """A square of `size` pixels from the middle of a grey or RGB picture.

    "center", as in StyleGAN's and EDM's preparation of data sets: the largest square in the
    middle, resized by Lanczos' filter. "dhariwal", as in ADM (Dhariwal and Nichol 2021,
    https://arxiv.org/abs/2105.05233) and EDM2: the shorter side is halved by 2x2 means while it
    is at least twice as long, brought to `size` by a bicubic filter, then the middle is cut out.
    """
    if crop == "center":
        short = min(image.size)
        image = _middle(image, short)
        if short == size:
            return image
        return image.resize((size, size), Image.Resampling.LANCZOS)
    while min(image.size) >= 2 * size:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    wanted = round(image.width * scale), round(image.height * scale)
    return _middle(image.resize(wanted, Image.Resampling.BICUBIC), size)


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle, the larger margin below and to the right."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG that is not compressed: large, and quick to read."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
