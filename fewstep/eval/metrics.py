"""Distances between two sets, as pure functions of features or pixels.

None of them alone tells a good generator: the Frechet distance cannot see beyond second moments,
precision misses lost modes, recall misses bad pictures, and a copy of the training set wins them
all. Report them together, beside real held-out data and the teacher.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.eval.fid import distance, exact, moments

CHUNK = 4096
"""Points whose distances to all others are held in memory at once."""


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to features a: (N, D), b: (M, D); see `fid`."""
    return distance(moments(a), moments(b))


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel inception distance of features a: (N, D), b: (M, D): unbiased, may be negative.

    The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, without the pairs of a
    point with itself, Binkowski et al. 2018, https://arxiv.org/abs/1801.01401; the mean over
    `subsets` of `size` points of each, drawn without replacement (fixed by `seed`), or one of all
    points where the sets are no larger. In float64.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs at least two points in each set")
    if size == len(a) == len(b):
        return _mmd(exact(a), exact(b))
    found = []
    for _ in range(subsets):
        x, y = (
            exact(part[torch.randperm(len(part), generator=generator)[:size].to(part.device)])
            for part in (a, b)
        )
        found.append(_mmd(x, y))
    return sum(found) / subsets


def _mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for x, y: (n, D)."""
    n = len(x)
    xx, yy, xy = ((p @ q.T / x.shape[1] + 1).pow(3) for p, q in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (n * (n - 1)) - 2 * xy.mean())


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the inception score needs of the predictions p(y | x) for a set of pictures."""

    count: int
    certainty: float
    """The sum over pictures of sum_y p log p."""
    total: Tensor
    """(classes,): the sum of p over pictures, float64."""

    @classmethod
    def of(cls, logits: Tensor) -> Predictions:
        """From logits (N, classes)."""
        log_p = exact(logits).log_softmax(1)
        p = log_p.exp()
        certainty = torch.where(p > 0, p * log_p, 0.0).sum()
        return cls(len(logits), float(certainty), p.sum(0).cpu())

    def __add__(self, other: Predictions) -> Predictions:
        return Predictions(
            self.count + other.count,
            self.certainty + other.certainty,
            self.total + other.total,
        )

    def score(self) -> float:
        """exp of the mean Kullback-Leibler divergence of p(y | x) to their mean p(y)."""
        q = self.total / self.count
        entropy = -torch.where(q > 0, q * q.log(), 0.0).sum()
        return math.exp(self.certainty / self.count + float(entropy))


def inception_score(parts: Sequence[Predictions]) -> tuple[float, float]:
    """Mean and (population) standard deviation of the score of each part.

    Salimans et al. 2016, https://arxiv.org/abs/1606.03498, who cut 50,000 pictures into ten; one
    part of all of them scores higher.
    """
    scores = [part.score() for part in parts]
    return statistics.fmean(scores), statistics.pstdev(scores)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each point of x: (N, D) to its k-th nearest other point: (N,)."""
    nearest = (torch.cdist(p, x).topk(k + 1, dim=1, largest=False) for p in x.split(CHUNK))
    return torch.cat([found.values[:, -1] for found in nearest])


def _inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of x: (N, D) within any of the balls around centres: (M, D)."""
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in x.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Precision: the share of `fake` inside the union of balls around real points that reach to
    their k-th neighbour; recall: the same with the roles exchanged. real, fake: (N, D), (M, D).
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} points in each set")
    return _inside(fake, real, _radii(real, k)), _inside(real, fake, _radii(fake, k))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """The mean 2-Wasserstein distance of projections of a: (N, D), b: (M, D).

    Root of the mean over `directions` random unit vectors of the squared one-dimensional
    distance, computed on 512 common quantiles (Rabin et al. 2012; directions fixed by `seed`).
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(a.shape[1], directions, generator=generator).to(a)
    unit = unit / unit.norm(dim=0)
    levels = ((torch.arange(512) + 0.5) / 512).to(a)
    gap = _quantiles(a @ unit, levels) - _quantiles(b @ unit, levels)
    return float((gap**2).mean().sqrt())


def _quantiles(x: Tensor, levels: Tensor) -> Tensor:
    """torch.quantile over the rows of x: (N, D) -> (levels, D), without its limit on the size."""
    place = levels * (len(x) - 1)
    low = place.floor()
    ordered, index = x.sort(dim=0).values, low.long()
    above = ordered[(index + 1).clamp_max(len(x) - 1)]
    return ordered[index].lerp(above, (place - low)[:, None])


def nearest(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance of each x: (N, D) to the nearest of reference: (M, D) -> (N,).

    Without the shortcut |a|^2 + |b|^2 - 2ab, so that a copy is at distance 0.
    """
    mode = "donot_use_mm_for_euclid_dist"
    parts = x.split(CHUNK)
    return torch.cat([torch.cdist(p, reference, compute_mode=mode).amin(1) for p in parts])
