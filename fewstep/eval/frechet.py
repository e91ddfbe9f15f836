"""Frechet distances of Gaussians fitted to features, from moments gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 256
"""Rows of a symmetric product that are computed at once, up to the diagonal's last."""
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and covariance of features, in float64: all that a Frechet distance needs."""

    mu: Tensor
    """(D,)."""
    sigma: Tensor
    """(D, D), unbiased: divided by the number of samples less one."""


def exact_products(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device (MPS) has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def strips(count: int) -> Iterator[slice]:
    """Runs of rows of a symmetric matrix; of each, the columns before its `stop` are enough."""
    for start in range(0, count, STRIP):
        yield slice(start, min(start + STRIP, count))


class MomentSum:
    """Mean and covariance accumulated over batches; memory for one D x D matrix."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.total: Tensor | None = None
        self.outer: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add features x: (N, D); ValueError where one is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError("a feature vector is not finite; are the pictures?")
        x = exact_products(x)
        if self.shift is None or self.total is None or self.outer is None:
            self.shift = x.mean(0)  # what cancels in the covariance is small around it
            self.total = torch.zeros_like(self.shift)
            self.outer = x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.shift
        self.count += len(x)
        self.total += x.sum(0)
        for rows in strips(len(self.outer)):
            self.outer[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop])

    def moments(self) -> FeatureMoments:
        """Moments of all samples added so far; ValueError where they are fewer than two."""
        if self.count < 2 or self.shift is None or self.total is None or self.outer is None:
            raise ValueError(f"moments need at least two samples, got {self.count}")
        mean, lower = self.total / self.count, self.outer.tril(-1)
        outer = lower + lower.T + self.outer.diagonal().diag()
        sigma = (outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureMoments((self.shift + mean).cpu(), sigma.cpu())


def moments(x: Tensor) -> FeatureMoments:
    """Mean and covariance of features x: (N, D), N >= 2, on the CPU in float64.

    Raises ValueError for fewer than two samples, or one that is not finite.
    """
    gather = MomentSum()
    gather.add(x)
    return gather.moments()


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, in float64. With S_a = A A^T and
    S_b = B B^T the trace of the root is the sum of the singular values of A^T B, which keeps the
    digits that the eigenvalues of S_a S_b lose in their roots.

    Arguments:
        a, b: moments of features, with mu (D,) and sigma (D, D); sigma may be singular.
    Raises ValueError where the dimensions differ.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"features of dimension {len(a.mu)} and {len(b.mu)} have no distance")
    gap = ((a.mu - b.mu) ** 2).sum()
    distance = gap + a.sigma.trace() + b.sigma.trace()
    if not bool((a.sigma + b.sigma).isfinite().all()):
        return float("nan")
    distance -= 2 * torch.linalg.svdvals(_root(a.sigma).T @ _root(b.sigma)).sum()
    return float(distance.clamp_min(0))  # what rounding leaves below, of equal sets


def _root(sigma: Tensor) -> Tensor:
    """A (D, R) with A A^T = sigma, of rank R up to rounding: by Cholesky where it is regular."""
    sigma = sigma.double()
    factor, failed = torch.linalg.cholesky_ex(sigma)
    pivots = factor.diagonal().square()
    if not failed and pivots.amin() > len(sigma) * EPS * pivots.amax():
        root: Tensor = factor
        return root
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(sigma) * EPS * values[-1]
    out: Tensor = vectors[:, kept] * values[kept].sqrt()
    return out
