"""Nearest neighbours in feature space, by comparisons of distances that are exact for copies.

Scores of neighbourhoods count pairs whose distance is at most a radius that is a distance itself.
So a rounding error of the last digit decides where sets hold copies, and the quick formula
|a|^2 + |b|^2 - 2ab loses all digits where features have a large mean. Here that formula, around
the mean and in float64, only sorts out; what is nearer to the border than its error bound is
computed again as the sum of squared differences, which is exact for copies. All distances are
squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fewstep.eval.frechet import exact_products

CHUNK = 128
"""Points whose distances to all others are held in memory at once: few enough for a cache."""
PAIRS = 8192
"""Pairs whose differences are held at once."""
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
    spread = _exponent(*sets)
    return tuple(torch.ldexp(x, -spread) for x in sets)


def _exponent(*sets: Tensor) -> Tensor:
    """The power of two, of half the widest extent of all sets together: a whole number."""
    low = torch.stack([x.amin(0) for x in sets]).amin(0)
    high = torch.stack([x.amax(0) for x in sets]).amax(0)
    return torch.frexp((high / 2 - low / 2).amax()).exponent


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Distance of row i of a and row i of b, both (N, D): (N,)."""
    return (a - b).square().sum(1)


class _Quick:
    """Points (M, D), made ready for the quick formula."""

    def __init__(self, points: Tensor) -> None:
        self.centre = points.mean(0)
        self.shifted = points - self.centre
        self.square = self.shifted.square().sum(1)
        self.reach = self.shifted.norm(dim=1)
        self.size = points.norm(dim=1) + self.centre.norm()

    def distances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x: (N, D) to the points, and bounds of their errors: two (N, M).

        The bound covers a sum of D products, and the rounding of what is subtracted from the
        centre.
        """
        a = x - self.centre
        square = a.square().sum(1)[:, None] + self.square - 2 * a @ self.shifted.T
        reach = a.norm(dim=1)[:, None] + self.reach
        lost = 4 * EPS * (x.norm(dim=1)[:, None] + self.size)
        return square, 4 * (x.shape[1] + 4) * EPS * reach.square() + (2 * reach + lost) * lost


def radii(x: Tensor, *ks: int) -> tuple[Tensor, ...]:
    """Distance of each point of x: (N, D) to its k-th nearest other one, for each k < N: (N,)."""
    quick = _Quick(x)
    parts = [_radii(x, quick, first, ks) for first in range(0, len(x), CHUNK)]
    return torch.cat(parts, 1).unbind()


def _radii(x: Tensor, quick: _Quick, first: int, ks: tuple[int, ...]) -> Tensor:
    """`radii` of the points first, ..., first + CHUNK - 1 of x, a row for each k."""
    rows = x[first : first + CHUNK]
    own = torch.arange(len(rows), device=x.device)
    square, error = quick.distances(rows)
    square[own, first + own] = torch.inf
    nearest = square.topk(min(max(ks) + SPARE, len(x) - 1), dim=1, largest=False).indices
    pairs = rows.repeat_interleave(nearest.shape[1], 0), x[nearest.flatten()]
    index = torch.tensor(ks, device=x.device) - 1
    out = _gaps(*pairs).view_as(nearest).sort(dim=1).values[:, index]
    # Whether another point may be nearer than the farthest of those that are asked for.
    least = (square - error).scatter(1, nearest, torch.inf).amin(1)
    for row in (least < out.amax(1)).nonzero().flatten().tolist():
        all_gaps = _gaps(rows[row].expand_as(x), x)
        all_gaps[first + row] = torch.inf
        out[row] = all_gaps.sort().values[index]
    return out.T


class Reference:
    """Features (N, D) that many sets are compared with: their radii are computed once.

    ks: the neighbours that will be asked for, whose radii come of the same distances.
    """

    def __init__(self, features: Tensor, ks: Sequence[int] = ()) -> None:
        self.features = features
        self.ks = ks
        self._radii: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def beside(self, other: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """These features and others: (M, D) as `scaled` gives them, and the radii of these there.

        A power of two changes no digit, so that it does not matter at which the radii were found.
        """
        own, others = scaled(self.features, other)
        features = exact_products(self.features)
        power = _exponent(features)
        if k not in self._radii:
            ks = [k, *(each for each in self.ks if each < len(features))]
            self._radii |= zip(ks, radii(torch.ldexp(features, -power), *ks), strict=True)
        moved = 2 * (power - _exponent(features, exact_products(other)))
        return own, others, torch.ldexp(self._radii[k], moved.clamp_max(0))  # of a point: 0


def within(x: Tensor, centres: Tensor, reach: Tensor) -> Iterator[Tensor]:
    """Whether points of x: (N, D) are within `reach`: (M,) of centres: (M, D); (n, M) a chunk."""
    quick = _Quick(centres)
    for rows in x.split(CHUNK):
        square, error = quick.distances(rows)
        inside = square + error <= reach
        near = (~inside & (square - error <= reach)).nonzero()
        for pairs in near.split(PAIRS):
            i, j = pairs.T
            inside[i, j] = _gaps(rows[i], centres[j]) <= reach[j]
        yield inside
