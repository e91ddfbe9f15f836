"""Picture files: PNG, JPEG and WebP, bounded before they are decoded; upright, crop and resize."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from fewstep.data.errors import Unfit
from fewstep.data.notes import FRAMES, UNREADABLE, UPRIGHT

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
PIXELS = 64 << 20
"""Pixels of one picture; a file of a few bytes can declare billions."""
THIN = 20
"""Pixels to a byte of a file that is a flat surface, or was made to fill the memory."""
THIN_PIXELS = 9 << 20
"""Pixels of such a picture, a little more than a screen of 4096 by 2160."""
SMALL = 1 << 20
"""Pixels that cost little whatever the file."""
SCANS = 200
"""Passes over the pixels in a progressive JPEG, usually ten; each can be of a few bytes."""
STRIP = 256
"""Rows that are laid on white at a time."""

Crop = Literal["center", "dhariwal"]
Note = Callable[[str], None]
"""Hears what happened to a picture unasked, for instance `notes.UPRIGHT`."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's values of Orientation, as `PIL.ImageOps.exif_transpose` reads them; 1 is upright."""
_SIDEWAYS = (5, 6, 7, 8)
_among = threading.local()


class Alone(Exception):
    """Raised for a picture that unpacks to much more than its size while others are decoded."""


@contextmanager
def among_others() -> Iterator[None]:
    """Within the block pictures that unpack to much more than their size raise `Alone`."""
    _among.others = True
    try:
        yield
    finally:
        _among.others = False


def alone(unpacked: int, packed: int) -> None:
    """Raise `Alone` within `among_others` where few bytes unpack to very many."""
    if unpacked > max(SMALL, THIN * packed) and getattr(_among, "others", False):
        raise Alone


class Head(NamedTuple):
    """Mode, channels and size of a picture, upright."""

    mode: str
    channels: int
    width: int
    height: int


def peek(data: bytes) -> Image.Image:
    """Open a picture and bound its size, without decoding it; `Unfit` says why not."""
    if data[:4] == b"RIFF" and (declared := _webp_pixels(data)) > PIXELS:
        raise Unfit(_oversized(), f"{declared:,} pixels")  # the decoder allocates as it opens
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Unfit(_oversized()) from None
    except Exception:  # the decoders raise many kinds
        raise Unfit("damaged") from None
    pixels, size = image.width * image.height, f"{image.width}x{image.height}"
    if pixels > PIXELS:
        raise Unfit(_oversized(), size)
    if pixels > max(THIN_PIXELS, THIN * len(data)):
        raise Unfit(f"larger than {THIN_PIXELS >> 20} megapixels in so few bytes", size)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > SCANS:
        raise Unfit(f"of more than {SCANS} scans")
    return image


def _webp_pixels(data: bytes) -> int:
    """Width times height that the first chunk of a WebP file declares; 0 where there is none.

    WebP Container Specification, https://developers.google.com/speed/webp/docs/riff_container
    """
    head, kind = data[20:30].ljust(10, b"\0"), data[12:16]
    if kind == b"VP8X":
        sides = int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        sides = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = struct.unpack("<HH", head[6:10])
        sides = width & 0x3FFF, height & 0x3FFF
    return sides[0] * sides[1]


def _oversized() -> str:
    return f"larger than {PIXELS >> 20} megapixels"


def decode(data: bytes, note: Note = lambda what: None) -> Image.Image:
    """The whole picture, upright; `Unfit` where it is damaged or oversized.

    A PNG's checksums are compared first: its pixels can come out of a file that is cut short.
    Of several frames the first is taken. `note` hears of that, and of a turn.
    """
    image = peek(data)
    alone(image.width * image.height, len(data))
    if image.format == "PNG" and not _sound(data):
        raise Unfit("damaged")
    try:
        image.load()
        if getattr(image, "n_frames", 1) > 1:
            note(FRAMES)
    except Exception:  # as above
        raise Unfit("damaged") from None
    turn = _orientation(image, note)
    if turn not in _TURNS:
        return image
    note(UPRIGHT)
    return image.transpose(_TURNS[turn])


def _sound(png: bytes) -> bool:
    """Whether every chunk up to the last one has the CRC-32 that it should.

    PNG specification, https://www.w3.org/TR/png-3/#5Chunk-layout: length, type, content, CRC of
    type and content. Pillow's own `verify` leaves a picture that must be opened again.
    """
    view, place, kind = memoryview(png), 8, b""
    while kind != b"IEND":
        if place + 12 > len(png):
            return False
        length, kind = struct.unpack_from(">L4s", png, place)
        end = place + 8 + length
        if png[end : end + 4] != zlib.crc32(view[place + 4 : end]).to_bytes(4, "big"):
            return False
        place = end + 4
    return True


def head(data: bytes) -> Head:
    """What `decode` would give, mostly without decoding; `Unfit` as `peek`."""
    image = peek(data)
    width, height = image.size
    mode, channels = image.mode, len(image.getbands())
    # a square has the same sides whichever way it is turned
    if width != height and _orientation(image, lambda what: None) in _SIDEWAYS:
        width, height = height, width
    return Head(mode, channels, width, height)


def _orientation(image: Image.Image, note: Note) -> int:
    """EXIF's Orientation, 1 to 8."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the readers of EXIF raise many kinds
        note(UNREADABLE)
        return 1
    return orientation if type(orientation) is int else 1


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 of a grey (C = 1) or RGB (C = 3) picture; others are `Unfit`."""
    if image.mode not in ("L", "RGB"):
        raise Unfit("neither grey nor RGB", image.mode)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def standard(image: Image.Image) -> Image.Image:
    """Any kind of picture as grey or RGB; transparent parts become white.

    16-bit and floating-point pictures are `Unfit`: which range they use is not known.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith(("I", "F")):
        raise Unfit("of more than 8 bits", image.mode)
    if image.mode == "1":
        return image.convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a transparent picture, strip by strip: the whole of it would be held four times."""
    out = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        box = 0, top, image.width, min(top + STRIP, image.height)
        over = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        out.paste(Image.alpha_composite(white, over).convert("RGB"), box)
    return out


def fit(image: Image.Image, size: int, crop: Crop = "center") -> Image.Image:
    """A square of `size` pixels from the middle of a grey or RGB picture.

    "center", as in StyleGAN's and EDM's preparation of data sets: the largest square in the
    middle, resized by Lanczos' filter. "dhariwal", as in ADM (Dhariwal and Nichol 2021,
    https://arxiv.org/abs/2105.05233) and EDM2: the shorter side is halved by 2x2 means while it
    is at least twice as long, brought to `size` by a bicubic filter, then the middle is cut out.
    """
    if crop == "center":
        return framed(image, size, size)
    while min(image.size) >= 2 * size:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    return _middle(image.resize(scaled, Image.Resampling.BICUBIC), size)


def framed(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest part of these proportions in the middle, resized by Lanczos' filter."""
    wide = image.width * height >= image.height * width
    w = round(image.height * width / height) if wide else image.width
    h = image.height if wide else round(image.width * height / width)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    image = image.crop((left, top, left + w, top + h))
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle, the larger margin below and to the right."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG that is not compressed: large, and quick to read."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
