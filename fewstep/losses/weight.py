"""Weights w of the score losses; every one is returned detached.

A weight that is a function of t alone leaves the theory intact. The per-sample L1 normaliser of
DMD and SiD depends on x: it evens out the scale of gradients over noise levels, but the
projection identity, and with it the meaning of SiD's alpha, then holds only approximately.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Weight(ABC):
    """(x, real, alpha_t, sigma_t) -> a detached factor that broadcasts against x: (B, *)."""

    @abstractmethod
    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weight of each sample, detached.

        Args:
            x: (B, *), the samples.
            real: (B, *), the teacher's predictions.
            alpha, sigma: (B, 1, ..., 1), the coefficients of the noise path.

        Returns: a tensor that broadcasts against x.
        """


@dataclass(frozen=True)
class Power(Weight):
    """scale * alpha^a * sigma^s, a function of t alone; the defaults are no weight at all.

    Power(2, -2) turns an x_0 loss into an eps loss (the SNR), Power(0, -2) into a rectified-flow
    velocity loss, Power(2, -4) turns |delta|^2 into the Fisher divergence.
    """

    a: float = 0.0
    """Power of alpha, the signal's factor."""
    s: float = 0.0
    """Power of sigma, the noise's factor."""
    scale: float = 1.0
    """Constant factor."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.scale * alpha**self.a * sigma**self.s).detach()


@dataclass(frozen=True)
class SNR(Weight):
    """offset + alpha^2 / sigma^2: few-step SiD's gamma_t = 4 + SNR_t for its adversarial terms.

    Zhou et al. 2025, https://arxiv.org/abs/2505.12674; the offset keeps noisy times in play.
    """

    offset: float = 4.0
    """What is added to alpha^2 / sigma^2."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.offset + alpha**2 / sigma**2).detach()


@dataclass(frozen=True)
class SignalNoise(Weight):
    """alpha sigma / (alpha^2 + sigma^2), at most 1/2: VSD's weight sigma^2 of eps, on any path.

    Nguyen & Tran 2023, https://arxiv.org/abs/2312.05239, where alpha^2 + sigma^2 = 1. A function
    of sigma / alpha alone, so that samples at the same SNR weigh the same on every path.
    """

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * sigma / (alpha**2 + sigma**2)).detach()


@dataclass(frozen=True)
class TruncatedSNR(Weight):
    """max(floor, alpha^2 / sigma^2): the larger of an x_0 and an eps loss, at floor 1.

    Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, section 4.
    """

    floor: float = 1.0
    """The smallest weight."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha**2 / sigma**2).clamp_min(self.floor).detach()


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(most, alpha^2 / sigma^2): an eps loss, and no more than `most` times an x_0 loss.

    Hang et al. 2023, https://arxiv.org/abs/2303.09556; TDM's fake score learns with it.
    """

    most: float = 5.0
    """The largest weight."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha**2 / sigma**2).clamp_max(self.most).detach()


@dataclass(frozen=True)
class EDMWeight(Weight):
    """(alpha^2 sd^2 + sigma^2) / (sigma sd)^2 = 1 / c_out^2, Karras et al. 2022, table 1."""

    sigma_data: float = 0.5
    """Standard deviation of the data, sd."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        sd2 = self.sigma_data**2
        return ((alpha**2 * sd2 + sigma**2) / (sigma**2 * sd2)).detach()


@dataclass(frozen=True)
class L1(Weight):
    """1 / mean |x - real| of each sample, computed in at least float32, bounded by 1 / floor.

    Yin et al. 2024 (DMD), equation 8; Zhou et al. 2024 (SiD), section 4.
    """

    floor: float = 1e-5
    """The smallest mean |x - real| that is divided by."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gap = (x - real).detach()
        if gap.dtype.itemsize < 4:
            gap = gap.float()
        mean = gap.abs().flatten(1).mean(1).clamp_min(self.floor)
        return mean.reciprocal().reshape(-1, *(1,) * (x.ndim - 1))
