"""Nearest neighbours in feature space, by comparisons of distances that are exact for copies.

Scores of neighbourhoods count pairs whose distance is at most a radius that is a distance itself.
So a rounding error of the last digit decides where sets hold copies, and the quick formula
|a|^2 + |b|^2 - 2ab loses all digits where features have a large mean. Here that formula, around
the mean and in float64, only sorts out; what is nearer to the border than its error bound is
computed again as the sum of squared differences, which is exact for copies. All distances are
squared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.eval.frechet import exact_products

CHUNK = 1024
"""Points whose distances to all others are held in memory at once."""
SPARE = 8
"""Neighbours beyond the k-th that are computed exactly."""
EPS = torch.finfo(torch.float64).eps


def scaled(*sets: Tensor) -> tuple[Tensor, ...]:
    """The sets (N_i, D) in float64, divided by one power of two near their spread.

    So that no square overflows or vanishes; ValueError where a value is not finite, or where the
    sets are not of one dimension.
    """
    if len({x.shape[1:] for x in sets}) > 1 or sets[0].ndim != 2:
        raise ValueError(f"sets of features are (N, D) of one D, got {[*map(_shape, sets)]}")
    sets = tuple(exact_products(x) for x in sets)
    if not all(bool(x.isfinite().all()) for x in sets):
        raise ValueError("a feature vector is not finite; are the pictures?")
    low = torch.stack([x.amin(0) for x in sets]).amin(0)
    high = torch.stack([x.amax(0) for x in sets]).amax(0)
    spread = torch.frexp((high / 2 - low / 2).amax()).exponent
    return tuple(torch.ldexp(x, -spread) for x in sets)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Distance of row i of a and row i of b, both (N, D): (N,)."""
    return (a - b).square().sum(1)


def _rough(x: Tensor, others: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of x: (N, D) and others: (M, D) by the quick formula, and bounds of their errors.

    The bound covers a sum of D products, and the rounding of what is subtracted from the centre.
    """
    a, b = x - centre, others - centre
    square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    reach = a.norm(dim=1)[:, None] + b.norm(dim=1)
    lost = 4 * EPS * (x.norm(dim=1)[:, None] + others.norm(dim=1) + centre.norm())
    return square, 4 * (x.shape[1] + 4) * EPS * reach.square() + (2 * reach + lost) * lost


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of each point of x: (N, D), N > k, to its k-th nearest other point: (N,)."""
    return torch.cat([_radii(x, first, k) for first in range(0, len(x), CHUNK)])


def _radii(x: Tensor, first: int, k: int) -> Tensor:
    """`radii` of the points first, ..., first + CHUNK - 1 of x."""
    rows = x[first : first + CHUNK]
    own = torch.arange(len(rows), device=x.device)
    square, error = _rough(rows, x, x.mean(0))
    square[own, first + own] = torch.inf
    nearest = square.topk(min(k + SPARE, len(x) - 1), dim=1, largest=False).indices
    pairs = rows.repeat_interleave(nearest.shape[1], 0), x[nearest.flatten()]
    out = _gaps(*pairs).view_as(nearest).kthvalue(k, dim=1).values
    # Whether another point may be nearer than the k-th of those.
    least = (square - error).scatter(1, nearest, torch.inf).amin(1)
    for row in (least < out).nonzero().flatten().tolist():
        all_gaps = _gaps(rows[row].expand_as(x), x)
        all_gaps[first + row] = torch.inf
        out[row] = all_gaps.kthvalue(k).values
    return out


def within(x: Tensor, centres: Tensor, reach: Tensor) -> Iterator[Tensor]:
    """Whether points of x: (N, D) are within `reach`: (M,) of centres: (M, D); (n, M) a chunk."""
    for rows in x.split(CHUNK):
        square, error = _rough(rows, centres, centres.mean(0))
        inside = square + error <= reach
        near = (~inside & (square - error <= reach)).nonzero()
        for pairs in near.split(CHUNK * SPARE):
            i, j = pairs.T
            inside[i, j] = _gaps(rows[i], centres[j]) <= reach[j]
        yield inside
