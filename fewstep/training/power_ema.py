"""Averages of weights with a power-function profile, and others reconstructed after training.

Karras et al. 2024 (https://arxiv.org/abs/2312.02696), section 3. The average at time t (here:
images) weighs the weights of an earlier time by a power of that time,

    average_gamma(t) = integral p(tau) theta(tau) dtau,
    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t],                      (equation 1)

so that its length is a fixed part of the training: the standard deviation of p is sigma_rel t,

    sigma_rel = (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)).               (equation 3)

Two averages that are stored now and then approximate all others well: by the combination of
stored ones whose profile is nearest, in least squares, to the requested one (appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[np.float64]]

LIMIT = 12**-0.5
"""sigma_rel of a plain mean, gamma = 0; lengths below it are meant here."""
ALIKE = 1e-12
"""Profiles that are the same to this relative precision are not told apart: their coefficients
would be large and opposite, and rounding of the weights would be seen in the result."""


@dataclass(frozen=True)
class PowerEMA:
    """Which averages a run keeps for reconstruction; none by default.

    They are stored with every checkpoint and not deleted: each is as large as the network. EDM2
    keeps 0.05 and 0.10.
    """

    sigma_rel: tuple[float, ...] = ()
    """Lengths of the averages as shares of the training, such as (0.05, 0.10)."""

    def __post_init__(self) -> None:
        for sigma in self.sigma_rel:
            gamma_of(sigma)
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"PowerEMA needs lengths that differ, got {self}")


def gamma_of(sigma_rel: float) -> float:
    """gamma of a length, 0 < sigma_rel < 12^(-1/2); ValueError for others (algorithm 2).

    The root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 that is positive.
    """
    if not 0 < sigma_rel < LIMIT:
        raise ValueError(f"sigma_rel is between 0 and {LIMIT:.4f}, got {sigma_rel}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The length of the profile tau^gamma (equation 3)."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def beta(gamma: float, t: float, step: float = 1.0) -> float:
    """The factor of the average in its update from t - step to t (equation 2)."""
    return float((1 - step / t) ** (gamma + 1))


def overlap(gamma: Array, t: Array, other: Array, s: Array) -> Array:
    """The integral of p_(gamma, t) p_(other, s), elementwise and broadcast (appendix C).

    (gamma + 1) (other + 1) / (gamma + other + 1) (min / max)^(power of the later) / max
    """
    later = np.where(t < s, other, gamma)
    ratio, last = np.minimum(t, s) / np.maximum(t, s), np.maximum(t, s)
    return (gamma + 1) * (other + 1) * ratio**later / ((gamma + other + 1) * last)


def combination(
    gammas: Sequence[float], times: Sequence[float], gamma: float, time: float
) -> tuple[Tensor, float]:
    """The combination of stored profiles (gammas[i], times[i]) nearest to (gamma, time).

    Algorithm 3: coefficients by least squares, divided by their sum, so that weights that never
    changed come back as they were however few profiles there are. Returns them (N,) in float64,
    and the distance of the profiles relative to the requested one's norm: 0 where it is matched, 1
    where nothing of it is. ValueError where there is none, or one that ends after `time`.
    """
    g, t = np.array(gammas, dtype=float), np.array(times, dtype=float)
    if not g.size or not (t.min() > 0 and t.max() <= time):
        raise ValueError(f"profiles to combine end between 0 and {time:g}, got times {times}")
    stored = overlap(g[:, None], t[:, None], g, t)
    last = np.array([gamma]), np.array([time])
    target, square = overlap(g, t, *last), float(overlap(*last, *last)[0])
    # Relative to the profiles' norms, which grow with gamma and shrink with t.
    norm = np.sqrt(stored.diagonal())
    if np.linalg.cond(stored / norm / norm[:, None]) < 1 / ALIKE:
        x = np.linalg.solve(stored, target)
    else:
        x = np.linalg.lstsq(stored / norm / norm[:, None], target / norm, rcond=ALIKE)[0] / norm
    x = x / math.fsum(x)
    rest = 1 - (2 * (x @ target) - x @ stored @ x) / square
    return torch.from_numpy(x), math.sqrt(max(float(rest), 0.0))


@torch.no_grad()
def update(average: nn.Module, net: nn.Module, kept: float) -> None:
    """average <- kept average + (1 - kept) net, in place; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - kept)
    for old, new in zip(average.buffers(), net.buffers(), strict=True):
        old.copy_(new)
