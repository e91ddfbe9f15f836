"""Grids of pictures as PNG, by numpy and pillow."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.diffusion.pixels import finite, to_uint8


def scatter(x: Tensor, size: int = 256, extent: float | None = None) -> np.ndarray:
    """Points (B, 2) as one picture (size, size, 1): white dots on black."""
    points = finite(x.detach()).float().cpu().numpy()
    extent = extent or float(np.abs(points).max()) * 1.1 + 1e-6
    cells = ((points / extent + 1) / 2 * (size - 1)).round().astype(int)
    inside = ((cells >= 0) & (cells < size)).all(1)
    canvas = np.zeros((size, size, 1), np.uint8)
    canvas[size - 1 - cells[inside, 1], cells[inside, 0]] = 255
    return canvas


def grid(x: Tensor, columns: int | None = None, cell: int = 48, gap: int = 4) -> Image.Image:
    """Pictures (B, C, H, W) in rows of `columns`, each enlarged to about `cell` pixels.

    Vectors (B, 2) become one scatter plot. Of latents (B, 4, H, W), three channels are colours.
    """
    if x.ndim == 2 and x.shape[1] == 2:
        return Image.fromarray(scatter(x)[..., 0])
    pictures = to_uint8(x[:, :3] if x.shape[1] == 4 else x).cpu().numpy()
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
