"""Geometric augmentation, whose parameters are further inputs of the network.

A fake score that sees few pictures of one kind overfits them; EDM's remedy is to move pictures
geometrically and to give the network the parameters of the movement as nine more inputs, zero for
a picture as it is (Karras et al. 2022, https://arxiv.org/abs/2206.00364, appendix F.2):

    flip x          1 or 0                      flip y       1 or 0
    scale           2^(0.2 n)                   rotate       by w, uniform on (-pi, pi)
    stretch         2^(0.2 n) along an axis r   translate    by (n, n') / 8 of the picture

Each movement happens with the same probability p, independently, but the flip in x, which is a
coin's throw for every picture. The flip in y that happens then is a coin's throw too, and the axis
of the stretch is that of x half of the time, else any, r uniform on (-pi, pi). The labels are

    [flip, flip, n, cos w - 1, sin w, n cos r, n sin r, n, n'].

Pictures are resampled at twice their size, reached and left by the sym6 wavelet's low-pass filter,
which is orthonormal: a picture that is not moved comes back as it was. Borders are mirrored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.constants import constant
from fewstep.diffusion.rng import Draws

SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
"""The filter (Daubechies 1992, table 6.3)."""
SHIFT = sum(k * f for k, f in enumerate(SYM6)) / sum(SYM6) - (len(SYM6) - 1) / 2
"""How far it moves what passes it, in fine pixels: it is only nearly symmetric."""

EDGE = 6
"""Pixels beyond the border that the filter reaches."""
AXIS = 0.5
"""Probability that a stretch is along an axis of its own."""


@dataclass(frozen=True)
class Augment:
    """The movements above, each with probability p.

    A call takes pictures (B, C, H, W) and draws, and returns the moved pictures and their labels
    (B, 9). ValueError for other shapes, and where p is no probability. Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, appendix F.2.
    """

    p: float = 0.12
    """Probability of each movement."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"Augment.p is a probability, got {self.p:g}")

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The moved pictures (B, C, H, W), and their labels (B, 9)."""
        if x.ndim != 4:
            raise ValueError(f"Augment moves pictures (B, C, H, W), got {tuple(x.shape)}")
        moves, labels = self.moves(draws, x.shape[3] / x.shape[2])
        flips = labels[:, :2].to(x)[:, :, None, None, None]
        x = torch.lerp(x, x.flip(3), flips[:, 0])
        x = torch.lerp(x, x.flip(2), flips[:, 1])
        return resample(x, moves.to(x)), labels.to(x)

    def moves(self, draws: Draws, aspect: float = 1.0) -> tuple[Tensor, Tensor]:
        """Where each point comes from in the (flipped) picture, (B, 3, 3), and labels (B, 9).

        aspect: width of the picture by its height, whose sides are both 2 units long; turns and
        stretches are those of its pixels.
        """

        def some(name: str, value: Tensor) -> Tensor:
            """`value` for the pictures that are moved so, zero for the others."""
            return torch.where(draws.uniform(f"{name}?") < self.p, value, 0.0)

        def normal(name: str) -> Tensor:
            return some(name, draws.normal(name, (1,))[:, 0])

        flip_x = draws.integers("flip x", 2).float()
        flip_y = some("flip y", draws.integers("flip y", 2).float())
        scale = normal("scale")
        angle = some("rotate", (2 * draws.uniform("rotate") - 1) * math.pi)
        stretch, axis = normal("stretch"), (2 * draws.uniform("axis") - 1) * math.pi
        axis = torch.where(draws.uniform("axis?") < AXIS, axis, 0.0)
        shift = torch.stack([some("shift", n) for n in draws.normal("shift", (2,)).T])
        one = torch.ones_like(scale)
        back = (
            diagonal(one / aspect, one),
            diagonal(2 ** (-0.2 * scale), 2 ** (-0.2 * scale)),
            rotation(angle),
            rotation(-axis)
            @ diagonal(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch))
            @ rotation(axis),
            diagonal(one * aspect, one),
            translation(-shift / 4 * one),  # an eighth of the picture, which is 2 units wide
        )
        labels = [flip_x, flip_y, scale, angle.cos() - 1, angle.sin()]
        labels += [stretch * axis.cos(), stretch * axis.sin(), *shift]
        return reduce(torch.matmul, back), torch.stack(labels, 1)


def resample(x: Tensor, moves: Tensor) -> Tensor:
    """The picture whose point p is x's at moves p; x: (B, C, H, W), moves: (B, 3, 3).

    Coordinates run from -1 to 1 over the picture; beyond it there is its mirror image, as far as
    one pixel less than its size, and zero beyond that.
    """
    height, width = x.shape[2:]
    left, right, top, bottom = _margins(moves, height, width)
    fine = _filter(F.pad(x, [left, right, top, bottom], mode="reflect"), transposed=True)
    picture = moves.new_tensor([width, height])
    source, canvas = moves.new_tensor(fine.shape[:1:-1]) / 2, picture + 2 * EDGE
    # From the middle of the canvas to that of the source, in pixels of the picture.
    linear = moves[:, :2, :2] * (picture / 2)[:, None] / (picture / 2)
    middle = moves.new_tensor([left - right, top - bottom]) / 2
    off = moves.new_full((2,), SHIFT / 2)
    shift = moves[:, :2, 2] * picture / 2 + middle + off - linear @ off
    maps = torch.cat([linear / source[:, None] * canvas, (shift * 2 / source)[:, :, None]], 2)
    size = [len(x), x.shape[1], 2 * (height + 2 * EDGE), 2 * (width + 2 * EDGE)]
    grid = F.affine_grid(maps, size, align_corners=False)
    moved = F.grid_sample(fine, grid, padding_mode="zeros", align_corners=False)
    back = _filter(moved, transposed=False)
    return back[:, :, EDGE : EDGE + height, EDGE : EDGE + width]


def _margins(moves: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels that moved pictures need beyond the left, right, top and bottom, where there are any.

    Whole pictures of a batch share them; more than are needed change nothing.
    """
    corners = moves.new_tensor([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    reach = (moves @ corners)[:, :2].abs().amax(2)  # (B, 2), 1 at the border
    size = moves.new_tensor([width, height])
    need = ((reach - 1) * size / 2).amax(0).ceil() + 2 * EDGE
    x, y = (
        int(min(max(n, EDGE), s - 1)) for n, s in zip(need.tolist(), (width, height), strict=True)
    )
    return x, x, y, y


def _filter(x: Tensor, transposed: bool) -> Tensor:
    """The filter along each axis of all channels, with stride 2: up, or (its transpose) down."""
    taps = constant(SYM6, x)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    channels = x.shape[1]
    for shape, stride, pad in (((1, 1, -1, 1), (2, 1), (5, 0)), ((1, 1, 1, -1), (1, 2), (0, 5))):
        kernel = taps.reshape(shape).repeat(channels, 1, 1, 1)
        x = convolve(x, kernel, stride=stride, padding=pad, groups=channels)
    return x


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    """The matrix that scales x by a and y by b: (B,), (B,) -> (B, 3, 3)."""
    return torch.diag_embed(torch.stack([a, b, torch.ones_like(a)], 1))


def rotation(w: Tensor) -> Tensor:
    """The matrix of a rotation by w radians: (B,) -> (B, 3, 3)."""
    cos, sin, zero, one = w.cos(), w.sin(), torch.zeros_like(w), torch.ones_like(w)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, one]
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def translation(by: Tensor) -> Tensor:
    """The matrix of a shift by (x, y): (2, B) -> (B, 3, 3)."""
    eye = torch.eye(3, dtype=by.dtype, device=by.device).repeat(by.shape[1], 1, 1)
    eye[:, 0, 2], eye[:, 1, 2] = by[0], by[1]
    return eye
