"""A batch that is a quadrature rule: even quantiles of z and eps, all pairs of them.

A mean over it is an expectation over two standard normal numbers, to about 1e-3 where the
integrand grows as a square; with a law of one time the whole of a loss is such a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, NoisePath, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.losses.weight import Power, Weight

F64 = torch.float64


def quantiles(count: int) -> Tensor:
    """Even quantiles of N(0, 1), scaled to variance 1: (count,)."""
    points = torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)
    return points / points.square().mean().sqrt()


@dataclass(frozen=True, eq=False)
class Even(Draws):
    """Draws that are given: `noise` for every normal purpose, `share` for every uniform one."""

    noise: Tensor = torch.empty(0)
    share: float = 0.5

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.noise.reshape(-1, *shape)

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((len(self.noise),), self.share, dtype=F64)


def batch(count: int = 400, **more: Any) -> Batch:
    """All pairs (z, eps) of `count` quantiles each, one-dimensional: z (count^2, 1)."""
    points = quantiles(count)
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(points, points, indexing="ij"))
    draws = Even(torch.arange(len(z)), noise=eps)
    return Batch(z, None, more.pop("x0", None), draws, more)


class Line(nn.Module):
    """The student a + b z of one dimension, z being what `FewStep` starts from over sigma."""

    def __init__(self, a: float, b: float, path: NoisePath = VE()) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=F64))
        self.b = nn.Parameter(torch.tensor(b, dtype=F64))
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.a + self.b * xt / self.path.sigma(expand(t, xt))

    def gradient(self, loss: Tensor) -> Tensor:
        """(d/da, d/db) of a loss."""
        return torch.stack(torch.autograd.grad(loss, [self.a, self.b], retain_graph=True))


@dataclass(frozen=True, eq=False)
class Rule(Weight):
    """The weight w, times those of a quadrature rule: the mean of a loss is then its expectation.

    rows: (B, 1), with a mean of 1.
    """

    rows: Tensor
    weight: Weight = Power()

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.rows * self.weight(x, real, alpha, sigma)


def hermite(b: float, t: float, count: int = 120, path: NoisePath = VE()) -> tuple[Batch, Tensor]:
    """Gauss-Hermite along x_t = alpha x + sigma eps of the student x = a + b z, and its weights.

    (z, eps) are turned so that x_t depends on one coordinate, which has `count` nodes; the other
    has two, exact where the integrand is quadratic in it. For integrands that are far from
    polynomials in x_t and need its tails, such as density ratios; to be used with `Rule`.
    """
    at = torch.tensor(t, dtype=F64)
    signal, noise = b * float(path.alpha(at)), float(path.sigma(at))
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(count))
    signs = torch.tensor([-1.0, 1.0], dtype=F64)
    grids = torch.meshgrid(nodes, signs, indexing="ij")
    along, across = (grid.reshape(-1, 1) for grid in grids)
    size = (signal**2 + noise**2) ** 0.5
    z, eps = (signal * along - noise * across) / size, (noise * along + signal * across) / size
    rows = (weights / weights.mean()).repeat_interleave(2)[:, None]
    return Batch(z, None, None, Even(torch.arange(len(z)), noise=eps)), rows
