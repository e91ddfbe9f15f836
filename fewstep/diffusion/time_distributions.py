"""Distributions of the training time t, written as quantile functions.

A law maps u ~ U(0, 1) to t, monotonically. Randomness stays outside (`Draws`), the same object
serves as a sampler's grid (`quantile` of a linspace), and a test needs no statistics.

    LogNormal     ln t ~ N(mean, std^2)              EDM training, https://arxiv.org/abs/2206.00364
    Karras        t^(1/rho) uniform                  SiD's generator step, EDM's sampling ladder
    Uniform       t ~ U[lo, hi]                      rectified flow
    Whole         t uniform on lo, lo + 1, ..., hi   VP timesteps
    LogitNormal   logit t ~ N(mean, std^2)           SD3, https://arxiv.org/abs/2403.03206; SiD-DiT
    Shifted       t / (shift (1 - t) + t) uniform   SD3 and its kin, training and sampling
    Discrete      t uniform on a finite set          few-step grids
    NoiseLevels   (sigma / alpha)^(1/rho) uniform    Karras's ladder, even log-SNR, on any path
    OfLevel       sigma / alpha has another law      EDM's laws on any path
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.diffusion.constants import constant
from fewstep.diffusion.noise_path import VE, VP, NoisePath


class TimeLaw(ABC):
    """A distribution of t on the path's time axis, given by its quantile function."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """t with P(T <= t) = u, elementwise: u in (0, 1), any shape -> the same shape.

        Non-decreasing in u.
        """

    def share(self, t: Tensor) -> Tensor:
        """P(T <= t), elementwise: any shape -> the same shape.

        Found by bisection of `quantile`, in double precision.
        """
        low, high = (torch.full_like(t, end, dtype=torch.float64) for end in (0.0, 1.0))
        for _ in range(50):
            middle = (low + high) / 2
            below = self.quantile(middle) <= t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(t)

    def within(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The law given low <= T <= high, elementwise: `quantile` of that.

        u: in (0, 1); low and high: times that broadcast against it. Where the law has no mass
        between them it is one of them.
        """
        a, b = self.share(low), self.share(high)
        return torch.clamp(self.quantile(a + u * (b - a)), low, high)


def _positive(law: TimeLaw, **values: float) -> None:
    """Refuse a law whose named values are not all positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{law} needs {name} > 0 and finite, got {value:g}")


@dataclass(frozen=True)
class LogNormal(TimeLaw):
    """ln t ~ N(mean, std^2); EDM's defaults."""

    mean: float = -1.2
    """Mean of ln t."""
    std: float = 1.2
    """Standard deviation of ln t, above 0."""

    def __post_init__(self) -> None:
        _positive(self, std=self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """exp(mean + std Phi^-1(u))."""
        out: Tensor = (self.mean + self.std * torch.special.ndtri(u)).exp()
        return out


@dataclass(frozen=True)
class Karras(TimeLaw):
    """t^(1/rho) uniform between lo^(1/rho) and hi^(1/rho), cut off at `tmax` thousandths.

    tmax = 800, the published setting of SiD, ends the ladder at t = 24.4 instead of 80.
    """

    lo: float = 0.002
    """Smallest time (sigma on EDM's path), 0 or more."""
    hi: float = 80.0
    """Largest time (sigma on EDM's path), where tmax is 1000."""
    rho: float = 7.0
    """Spacing, above 0; 1 is even, larger values draw times to `lo`."""
    tmax: float = 1000.0
    """How much of the way from lo to hi is kept, in thousandths, above 0; 1000: all of it."""

    def __post_init__(self) -> None:
        _positive(self, rho=self.rho, tmax=self.tmax, **{"hi - lo": self.hi - self.lo})
        if self.lo < 0:
            raise ValueError(f"{self} needs lo >= 0, got {self.lo:g}")

    def quantile(self, u: Tensor) -> Tensor:
        """(lo^(1/rho) + u (tmax / 1000) (hi^(1/rho) - lo^(1/rho)))^rho."""
        lo, hi = self.lo ** (1 / self.rho), self.hi ** (1 / self.rho)
        out: Tensor = (lo + u * (self.tmax / 1000) * (hi - lo)) ** self.rho
        return out


@dataclass(frozen=True)
class Uniform(TimeLaw):
    """t ~ U[lo, hi]."""

    lo: float = 0.0
    """Smallest time, in units of the path."""
    hi: float = 1.0
    """Largest time, in units of the path."""

    def __post_init__(self) -> None:
        _positive(self, **{"hi - lo": self.hi - self.lo})

    def quantile(self, u: Tensor) -> Tensor:
        """lo + (hi - lo) u."""
        return self.lo + (self.hi - self.lo) * u


@dataclass(frozen=True)
class Whole(TimeLaw):
    """t uniform on the whole numbers lo .. hi, such as timesteps."""

    lo: int = 0
    """Smallest time, such as the first timestep."""
    hi: int = 999
    """Largest time, such as the last timestep."""

    def __post_init__(self) -> None:
        if not self.lo < self.hi:
            raise ValueError(f"{self} needs lo < hi")

    def quantile(self, u: Tensor) -> Tensor:
        """lo + floor(u (hi - lo + 1)), at most hi."""
        return (self.lo + (u * (self.hi - self.lo + 1)).floor()).clamp(max=self.hi)


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """t = sigmoid(n), n ~ N(mean, std^2)."""

    mean: float = 0.0
    """Mean of logit t; 0 is t = 1/2, larger values draw times to 1."""
    std: float = 1.0
    """Standard deviation of logit t, above 0."""

    def __post_init__(self) -> None:
        _positive(self, std=self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """sigmoid(mean + std Phi^-1(u))."""
        out: Tensor = (self.mean + self.std * torch.special.ndtri(u)).sigmoid()
        return out


@dataclass(frozen=True)
class Discrete(TimeLaw):
    """t uniform on `values`, given in increasing order."""

    values: tuple[float, ...]
    """The times, in increasing order, in units of the path."""

    def __post_init__(self) -> None:
        if not self.values or list(self.values) != sorted(self.values):
            raise ValueError(f"Discrete.values must be increasing and not empty: {self.values}")

    def quantile(self, u: Tensor) -> Tensor:
        """values[floor(u n)] of the n values."""
        n = len(self.values)
        table = constant(self.values, u)
        return table[(u * n).long().clamp(0, n - 1)]


@dataclass(frozen=True)
class Shifted(TimeLaw):
    """t = shift v / (1 + (shift - 1) v), v ~ U[lo, 1]: the resolution shift of flow models.

    Esser et al. 2024 (SD3), https://arxiv.org/abs/2403.03206, equation 23; 3 at 1024 pixels.
    """

    shift: float = 3.0
    """Shift, above 0; 1 is none, larger values draw times to 1, the noise."""
    lo: float = 0.0
    """Smallest v, below 1; the shift makes the smallest time of it."""

    def __post_init__(self) -> None:
        _positive(self, shift=self.shift, **{"1 - lo": 1 - self.lo})

    def quantile(self, u: Tensor) -> Tensor:
        """shift v / (1 + (shift - 1) v) at v = lo + (1 - lo) u."""
        v = self.lo + (1 - self.lo) * u
        return self.shift * v / (1 + (self.shift - 1) * v)


@dataclass(frozen=True)
class NoiseLevels(TimeLaw):
    """l^(1/rho) uniform between lo and hi, l = sigma / alpha the noise level; rho = inf: ln l.

    Karras's ladder (https://arxiv.org/abs/2206.00364, equation 5) on any path, and with infinite
    rho the one of equal steps in log-SNR (https://arxiv.org/abs/2206.00927). Times of a path of
    timesteps are whole.
    """

    path: NoisePath = VE()
    """The noise path whose times these are."""
    lo: float = 0.002
    """Smallest noise level sigma / alpha, above 0."""
    hi: float = 80.0
    """Largest noise level sigma / alpha."""
    rho: float = 7.0
    """Spacing, above 0; 1 is even in l, larger values draw levels to `lo`, inf: even in ln l."""

    def __post_init__(self) -> None:
        if not (0 < self.lo < self.hi < math.inf and self.rho > 0):
            raise ValueError(
                "NoiseLevels needs levels 0 < lo < hi, which are finite, and rho > 0; got "
                f"{self.lo:g}, {self.hi:g} and {self.rho:g}"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The time of the level (lo^(1/rho) + u (hi^(1/rho) - lo^(1/rho)))^rho."""
        if self.rho == math.inf:
            level = self.lo * (self.hi / self.lo) ** u
        else:
            lo, hi = self.lo ** (1 / self.rho), self.hi ** (1 / self.rho)
            level = (lo + u * (hi - lo)) ** self.rho
        times = self.path.time_of(level / (1 + level))
        return times.round() if isinstance(self.path, VP) else times


@dataclass(frozen=True)
class OfLevel(TimeLaw):
    """The times of `path` whose noise level l = sigma / alpha has the law `levels`.

    Where t is no noise level, as it is for EDM, this carries EDM's laws over; levels that the path
    does not reach are left out. Times of a path of timesteps are whole.
    """

    levels: TimeLaw
    """The law of the noise level l = sigma / alpha."""
    path: NoisePath
    """The noise path whose times these are."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time of the level that has the share u of those on the path below it."""
        low, high = self._reached
        level = self.levels.quantile(low + u * (high - low))
        times = self.path.time_of(1 / (1 + 1 / level))
        return times.round() if isinstance(self.path, VP) else times

    def share(self, t: Tensor) -> Tensor:
        """P(T <= t), elementwise: any shape -> the same shape."""
        low, high = self._reached
        whole = t.double() + 0.5 if isinstance(self.path, VP) else t.double()
        whole = whole.clamp(self.path.t_min, self.path.t_max)
        share = (self.levels.share(self._level(whole)) - low) / (high - low)
        return torch.where(t >= self.path.t_max, 1.0, share.clamp(0.0, 1.0)).to(t)

    def _level(self, t: Tensor) -> Tensor:
        return self.path.sigma(t) / self.path.alpha(t)

    @cached_property
    def _reached(self) -> tuple[float, float]:
        """The shares of `levels` below the path's least noise, and below its most."""
        ends = [self.path.t_min, self.path.t_max]
        found = self.levels.share(
            self._level(torch.tensor(ends, dtype=torch.float64, device="cpu"))
        )
        low, high = found.tolist()
        if not low < high:
            raise ValueError(f"{self.path} has no noise levels of {self.levels}")
        return low, high
