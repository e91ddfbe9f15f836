"""Grids of samples as PNG, by numpy and pillow."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.diffusion.pixels import finite, to_uint8

FRAMES = 9
"""Of a film that are shown."""


def scatter(x: Tensor, size: int = 256, extent: float | None = None) -> np.ndarray:
    """Points (B, 2) as one picture (size, size, 1): white dots on black."""
    points = finite(x.detach()).float().cpu().numpy()
    extent = extent or float(np.abs(points).max()) * 1.1 + 1e-6
    cells = ((points / extent + 1) / 2 * (size - 1)).round().astype(int)
    inside = ((cells >= 0) & (cells < size)).all(1)
    canvas = np.zeros((size, size, 1), np.uint8)
    canvas[size - 1 - cells[inside, 1], cells[inside, 0]] = 255
    return canvas


def curves(x: Tensor, side: int = 64) -> Tensor:
    """Signals (B, C, L) as pictures (B, 1, side, side) in [-1, 1], a curve for each channel.

    The middle is 0, the edges are the largest number of all; earlier channels are brighter.
    """
    signals = finite(x.detach()).double().cpu().numpy()
    extent = float(np.abs(signals).max(initial=0)) * 1.05 + 1e-12
    count, channels, length = signals.shape
    places, rows = np.linspace(0, length - 1, side), np.arange(side)[:, None]
    canvas = np.zeros((count, 1, side, side), np.float32)
    canvas[:, :, side // 2] = 0.15
    for channel in reversed(range(channels)):
        ink = 1 - 0.6 * channel / channels
        for sample in range(count):
            y = np.interp(places, np.arange(length), signals[sample, channel])
            y = np.rint((1 - y / extent) / 2 * (side - 1))
            before = np.append(y[:1], y[:-1])  # a line from one column to the next
            lit = (rows >= np.minimum(y, before)) & (rows <= np.maximum(y, before))
            canvas[sample, 0][lit] = ink
    return torch.from_numpy(canvas) * 2 - 1


def tiled(x: Tensor, dim: int) -> Tensor:
    """x with `dim` gone: its entries side by side, nearly in a square of the last two axes."""
    parts = list(x.unbind(dim))
    columns = math.ceil(math.sqrt(len(parts)))
    parts += [torch.full_like(parts[0], -1)] * (-len(parts) % columns)
    return torch.cat(
        [torch.cat(parts[i : i + columns], -1) for i in range(0, len(parts), columns)], -2
    )


def as_pictures(x: Tensor) -> Tensor:
    """Samples (B, *) of any shape as pictures (B, 1 or 3, H, W), to be looked at.

    (B, 1 or 3, H, W) are pictures; of latents (B, 4, H, W) three channels are colours; other
    channels are tiles. Of films and volumes (B, C, T, H, W) some frames are tiles. (B, L),
    (B, C, L) and all else are curves.
    """
    if x.ndim == 5:
        frames = torch.linspace(0, x.shape[2] - 1, min(x.shape[2], FRAMES)).round().long()
        x = tiled(x[:, :, frames], 2)
    if x.ndim == 4:
        if x.shape[1] == 4:
            x = x[:, :3]
        return x if x.shape[1] in (1, 3) else tiled(x, 1)[:, None]
    return curves(x if x.ndim == 3 else x.flatten(1)[:, None])


def is_points(x: Tensor) -> bool:
    """Whether samples are points in the plane, (B, 2)."""
    return x.ndim == 2 and x.shape[1] == 2


def class_columns(classes: int, count: int) -> int | None:
    """Columns of a grid with all classes in turn: one each, where ten classes fill a row."""
    return 10 if classes == 10 <= count else None


def grid(x: Tensor, columns: int | None = None, cell: int = 48, gap: int = 4) -> Image.Image:
    """Samples (B, *) as pictures in rows of `columns`, each enlarged to about `cell` pixels.

    Points (B, 2) become one scatter plot; how others look, `as_pictures` says.
    """
    if is_points(x):
        return Image.fromarray(scatter(x)[..., 0])
    pictures = to_uint8(as_pictures(x)).cpu().numpy()
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, round(cell / max(height, width)))
    pictures = pictures.repeat(scale, 1).repeat(scale, 2)
    step_y, step_x = height * scale + gap, width * scale + gap
    canvas = np.full((rows * step_y + gap, columns * step_x + gap, channels), 56, np.uint8)
    for place, picture in enumerate(pictures):
        y, x0 = gap + place // columns * step_y, gap + place % columns * step_x
        canvas[y : y + height * scale, x0 : x0 + width * scale] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
