"""Distances between two sets, as pure functions of features or pixels.

None of them alone tells a good generator: the Frechet distance cannot see beyond second moments,
precision and density miss lost modes, recall and coverage miss bad pictures, and a copy of the
training set wins them all. Report them together, beside real held-out data and the teacher.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.eval.frechet import exact_products, frechet_distance, moments, strips
from fewstep.eval.neighbours import Reference, radii, within

CHUNK = 4096
"""Points whose distances to all others are held in memory at once."""
BLOCK = 32
"""Directions whose projections are held in memory at once."""

NEIGHBOURS = 5
"""k of density and coverage, as published."""


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to two sets of features.

    Arguments:
        a: (N, D) features, N >= 2.
        b: (M, D) features, M >= 2.
    Returns the squared distance, see `frechet_distance`; in Inception's features it is the FID.
    Raises ValueError for fewer than two samples, features that are not finite, or another D.
    """
    return frechet_distance(moments(a), moments(b))


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel inception distance: an unbiased estimate, which may be negative.

    The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, without the pairs of a
    point with itself, Binkowski et al. 2018, https://arxiv.org/abs/1801.01401; in float64.

    Arguments:
        a: (N, D) features.
        b: (M, D) features.
        subsets: number of subsets that the estimate is averaged over.
        size: points of each set in a subset, drawn without replacement; where both sets have no
            more than this and equally many, one subset of all points is used.
        seed: fixes the subsets.
    Raises ValueError where a set has fewer than two points.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs at least two points in each set")
    if size == len(a) == len(b):
        return _mmd(exact_products(a), exact_products(b))
    estimates = []
    for _ in range(subsets):
        x, y = (
            exact_products(
                part[torch.randperm(len(part), generator=generator)[:size].to(part.device)]
            )
            for part in (a, b)
        )
        estimates.append(_mmd(x, y))
    return sum(estimates) / subsets


def _mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared discrepancy of x, y: (n, D)."""
    pairs = len(x) * (len(x) - 1) / 2
    return float((_pairs(x) + _pairs(y)) / pairs - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of all points of x: (n, D) and y: (m, D); (n, m)."""
    return (x @ y.T / x.shape[1] + 1).pow_(3)


def _pairs(x: Tensor) -> Tensor:
    """The sum () of the kernel over the pairs of different points of x: (n, D), each once."""
    parts = (_kernel(x[rows], x[: rows.stop]).tril_(rows.start - 1) for rows in strips(len(x)))
    return torch.stack([part.sum() for part in parts]).sum()


@dataclass(frozen=True, eq=False)
class ClassProbabilities:
    """Sums over class predictions p(y | x) that the inception score is computed from."""

    count: int
    certainty: float
    """The sum over pictures of sum_y p log p."""
    total: Tensor
    """(classes,): the sum of p over pictures, float64."""

    @classmethod
    def of(cls, logits: Tensor) -> ClassProbabilities:
        """From logits (N, classes)."""
        log_p = exact_products(logits).log_softmax(1)
        p = log_p.exp()
        certainty = torch.where(p > 0, p * log_p, 0.0).sum()
        return cls(len(logits), float(certainty), p.sum(0).cpu())

    def __add__(self, other: ClassProbabilities) -> ClassProbabilities:
        return ClassProbabilities(
            self.count + other.count,
            self.certainty + other.certainty,
            self.total + other.total,
        )

    def score(self) -> float:
        """exp of the mean Kullback-Leibler divergence of p(y | x) to their mean p(y)."""
        q = self.total / self.count
        entropy = -torch.where(q > 0, q * q.log(), 0.0).sum()
        return math.exp(self.certainty / self.count + float(entropy))


def inception_score(parts: Sequence[ClassProbabilities]) -> tuple[float, float]:
    """The inception score: its mean and (population) standard deviation over `parts`.

    Salimans et al. 2016, https://arxiv.org/abs/1606.03498, who cut 50,000 pictures into ten parts;
    one part of all pictures scores higher.

    Arguments:
        parts: class predictions of disjoint sets of pictures, at least one.
    """
    scores = [part.score() for part in parts]
    return statistics.fmean(scores), statistics.pstdev(scores)


def precision_recall(real: Tensor | Reference, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Precision: the share of `fake` inside the union of balls around real points that reach to their
    k-th neighbour; recall: the same with the roles exchanged. Published values are in features of
    VGG-16.

    Arguments:
        real: (N, D) features, N > k; as a `Reference` where many sets are compared with them.
        fake: (M, D) features, M > k.
        k: the neighbour that sets the radius of a ball.
    Returns (precision, recall), each in [0, 1].
    Raises ValueError where a set is too small, the dimensions differ or a feature is not finite.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} points in each set")
    known = real if isinstance(real, Reference) else Reference(real)
    real, fake, reach = known.beside(fake, k)
    return _inside(fake, real, reach), _inside(real, fake, *radii(fake, k))


def _inside(x: Tensor, centres: Tensor, reach: Tensor) -> float:
    """The share of x: (N, D) within any of the balls around centres: (M, D)."""
    inside = [part.any(1) for part in within(x, centres, reach)]
    return float(torch.cat(inside).double().mean())


def density_coverage(
    real: Tensor | Reference, fake: Tensor, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Density and coverage, Naeem et al. 2020, https://arxiv.org/abs/2002.09797, equation 3.

    With balls around the real points alone, which reach to their k-th neighbour: density is the
    mean number of balls that a point of `fake` is in, divided by k, and may be above 1; coverage
    is the share of the balls that hold one. Unlike precision and recall, they change little with
    one outlier.

    Arguments:
        real: (N, D) features, N > k; as a `Reference` where many sets are compared with them.
        fake: (M, D) features, M >= 1.
        k: the neighbour that sets the radius of a ball; 5 is published.
    Returns (density, coverage).
    Raises ValueError where a set is too small, the dimensions differ or a feature is not finite.
    """
    if len(real) <= k or not len(fake):
        raise ValueError(f"density and coverage need more than k = {k} real points, and others")
    known = real if isinstance(real, Reference) else Reference(real)
    real, fake, reach = known.beside(fake, k)
    count, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for inside in within(fake, real, reach):
        count += int(inside.sum())
        covered |= inside.any(0)
    return count / (k * len(fake)), float(covered.double().mean())


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """The sliced 2-Wasserstein distance (Rabin et al. 2012), in float64.

    The root of the mean, over random unit vectors, of the squared one-dimensional distance of the
    projections, which couples equal quantiles exactly, also where N and M differ.

    Arguments:
        a: (N, D) points.
        b: (M, D) points.
        directions: number of unit vectors.
        seed: fixes them.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    a, b = exact_products(a), exact_products(b)
    unit = (unit / unit.norm(dim=0)).to(a.device)
    i, j, share = _coupling(len(a), len(b))
    i, j, share = i.to(a.device), j.to(a.device), share.to(a.device)
    total = 0.0
    for part in unit.split(BLOCK, dim=1):
        gap = (a @ part).sort(dim=0).values[i] - (b @ part).sort(dim=0).values[j]
        total += float((share @ gap.square()).sum())
    return math.sqrt(total / directions)


def _coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of n and of m sorted points are coupled, and what share of the mass: three (K,).

    Between two levels of {1/n, ..., n/n, 1/m, ..., m/m} both quantile functions are constant; in
    whole numbers, so that equal levels are equal.
    """
    levels = torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]).unique()
    low, share = levels[:-1], levels.diff().double() / (n * m)
    return low // m, low // n, share


def nearest(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance of each point to its nearest neighbour in another set.

    Computed without the shortcut |a|^2 + |b|^2 - 2ab, so that a copy is at distance 0.

    Arguments:
        x: (N, D) points.
        reference: (M, D) points, M >= 1.
    Returns (N,) distances.
    """
    mode = "donot_use_mm_for_euclid_dist"
    parts = x.split(CHUNK)
    return torch.cat([torch.cdist(p, reference, compute_mode=mode).amin(1) for p in parts])
