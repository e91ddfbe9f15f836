"""Scenes drawn from captions, without end: picture n is a function of the draws of number n.

An emoji stands on white in its file. White that is connected with the border is outside; at its
rim a pixel's share of the object is read from how white it is beside the object's own colour. The
object is then shrunk and laid on a background of its own colour, jittered, with a slope.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.scenes.captions import COLOURS, SIZES, WORDS, Caption
from fewstep.diffusion.rng import Draws

SIDE = 32
"""Of a picture, in pixels."""
PAIRED = (12, 15)
"""Sides of two objects in one scene."""
LOOSE = 0.3
"""A said place leaves so much of the room in its direction; in the middle, half of it each way."""
JITTER, SLOPE = 12.0, 22.0
"""Deviation of a background's colour, and the most it changes from the centre to an edge."""
WHITE = 247
FILE = Path(__file__).with_name("noto_32.npz")


class Objects:
    """The emoji of each word, cut out, at every side that is drawn, mirrored or not."""

    def __init__(self, file: Path = FILE) -> None:
        images, words = read(file)
        self.cut = [cut_out(image) for image in images]
        self.of = [[i for i, name in enumerate(words) if name == word] for word in WORDS]

    @cached_property
    def shrunk(self) -> dict[tuple[int, int, bool], np.ndarray]:
        """(emoji, side, mirrored) -> (side, side, 4), colours times their share, and the share."""
        low, high = SIZES[""]
        table = {}
        for number, cut in enumerate(self.cut):
            for side in range(low, high + 1):
                small = shrink(cut, side)
                table[number, side, False] = small
                table[number, side, True] = small[:, ::-1]
        return table


def read(file: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures (N, 32, 32, 3) uint8 and the word of each; ValueError where they are not there."""
    if not file.is_file():
        raise ValueError(f"there is no file {file} of emoji; it belongs to the example")
    try:
        with np.load(file, allow_pickle=False) as table:
            images, words = table["images"], table["words"].tolist()
    except (ValueError, KeyError, EOFError, BadZipFile):
        raise ValueError(f"{file} is no .npz with images and words") from None
    if missing := sorted(set(WORDS) - set(words)):
        raise ValueError(f"{file} has no picture of {missing[0]!r}")
    return images, words


def cut_out(image: np.ndarray) -> np.ndarray:
    """An object on white (H, W, 3) uint8 -> (H, W, 4) in 0 .. 1, colours times their share."""
    colour = image.astype(np.float64)
    outside = reached(image.min(2) >= WHITE)
    near = np.zeros_like(outside)
    for shift in (-1, 1):
        near |= np.roll(outside, shift, 0) | np.roll(outside, shift, 1)
    rim = near & ~outside
    inner = ~outside & ~rim
    share = (~outside).astype(np.float64)
    own = colour.copy()
    for y, x in zip(*np.nonzero(rim), strict=True):
        window = np.s_[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if inner[window].any():
            own[y, x] = colour[window][inner[window]].mean(0)
            depth = 255 - own[y, x].min()
            share[y, x] = np.clip((255 - colour[y, x].min()) / max(depth, 30.0), 0, 1)
    return np.concatenate([own / 255 * share[..., None], share[..., None]], 2)


def reached(white: np.ndarray) -> np.ndarray:
    """Pixels of `white` (H, W) that are connected with the border."""
    height, width = white.shape
    outside = np.zeros_like(white)
    queue = deque(
        (y, x)
        for y in range(height)
        for x in range(width)
        if (y in (0, height - 1) or x in (0, width - 1)) and white[y, x]
    )
    while queue:
        y, x = queue.popleft()
        if 0 <= y < height and 0 <= x < width and white[y, x] and not outside[y, x]:
            outside[y, x] = True
            queue.extend(((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)))
    return outside


def shrink(cut: np.ndarray, side: int) -> np.ndarray:
    """A cut-out object at another size, channel by channel, by pillow's antialiased bicubic."""
    planes = [
        np.asarray(
            Image.fromarray(plane.astype(np.float32)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for plane in np.moveaxis(cut, 2, 0)
    ]
    small = np.stack(planes, 2).clip(0, 1)
    small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
    return small


def boxes(caption: Caption, u: Sequence[float]) -> list[tuple[int, int, int]]:
    """(left, top, side) of each object, in pixels; u: six uniform numbers."""
    if caption.second < 0:
        low, high = SIZES[caption.size]
        side = low + int(u[0] * (high - low + 1))
        room = SIDE - side
        across, down = placed(caption.place, u[1], u[2])
        return [(round(across * room), round(down * room), side)]
    low, high = PAIRED
    found = []
    for number in (0, 1):
        side = low + int(u[3 * number] * (high - low + 1))
        half = SIDE // 2 - side
        along = number * SIDE // 2 + round(u[3 * number + 1] * half)
        across = round(u[3 * number + 2] * (SIDE - side))
        left, top = (across, along) if caption.relation == "above" else (along, across)
        found.append((left, top, side))
    return found


def placed(place: str, u: float, v: float) -> tuple[float, float]:
    """How much of the room is left of an object, and above it, each 0 to 1."""
    if place == "in the middle":
        return 0.5 + (u - 0.5) * LOOSE, 0.5 + (v - 0.5) * LOOSE
    ends = {
        "at the left": (u * LOOSE, v),
        "at the right": (1 - u * LOOSE, v),
        "at the top": (u, v * LOOSE),
        "at the bottom": (u, 1 - v * LOOSE),
    }
    return ends.get(place, (u, v))


def background(colour: int, jitter: np.ndarray, angle: float, slope: float) -> np.ndarray:
    """(32, 32, 3) in 0 .. 1: the colour, and a slope of it in a direction."""
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE / 2 - 0.5) - 1
    mean = np.array(tuple(COLOURS.values())[colour]) + JITTER * jitter
    rise = SLOPE * slope * (x * math.cos(angle) + y * math.sin(angle))
    return ((mean + rise[..., None]) / 255).clip(0, 1)


def draw(
    objects: Objects, captions: Sequence[Caption], draws: Draws
) -> tuple[Tensor, list[list[tuple[int, int, int]]]]:
    """Pictures (B, 3, 32, 32) in [-1, 1] of the captions, and the boxes of their objects."""
    jitter = draws.normal("jitter", (3,)).numpy().clip(-2, 2)
    u = torch.stack([draws.uniform(f"place{i}") for i in range(12)], 1).tolist()
    pictures = np.empty((len(captions), SIDE, SIDE, 3), np.float32)
    found = []
    for row, caption in enumerate(captions):
        some = u[row]
        angle, slope = 2 * math.pi * some[6], some[7]
        canvas = background(caption.colour, jitter[row], angle, slope)
        places = boxes(caption, some)
        for number, (word, box) in enumerate(zip(caption.objects, places, strict=True)):
            own = objects.of[word]
            emoji = own[int(some[8 + 2 * number] * len(own))]
            lay(canvas, objects.shrunk[emoji, box[2], some[9 + 2 * number] < 0.5], box)
        pictures[row] = canvas
        found.append(places)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, found


def lay(canvas: np.ndarray, small: np.ndarray, box: tuple[int, int, int]) -> None:
    """Put an object onto a canvas (H, W, 3), in place."""
    left, top, side = box
    window = canvas[top : top + side, left : left + side]
    window *= 1 - small[..., 3:]
    window += small[..., :3]
