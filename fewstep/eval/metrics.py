"""Distances between two sets, as pure functions of features or pixels.

None of them alone tells a good generator: the Frechet distance cannot see beyond second moments,
precision misses lost modes, recall misses bad pictures, and a copy of the training set wins them
all. Report them together, beside real held-out data and the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096
"""Points whose distances to all others are held in memory at once."""


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a: (N, D), b: (M, D).

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, in float64, with unbiased covariances;
    the trace of the root is the sum of the roots of the eigenvalues of S_a S_b.
    """
    a, b = a.double(), b.double()
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * root)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each point of x: (N, D) to its k-th nearest other point: (N,)."""
    return torch.cat([torch.cdist(p, x).kthvalue(k + 1, dim=1).values for p in x.split(CHUNK)])


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
