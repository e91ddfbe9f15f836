"""Noise paths: how a picture turns into noise.

Every diffusion or flow model of the field corrupts data along

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I),

with t = 0 at the data and t growing with the noise. A `NoisePath` is the pair
(alpha_t, sigma_t); everything else (velocities, scores, changes of parameterisation) follows
from it and is written once, below, for all paths. Derivatives in t come from forward-mode
differentiation of the two functions, never from a second formula that could disagree.

    VE          1,           t              Karras et al. 2022, https://arxiv.org/abs/2206.00364
    VP          sqrt(abar),  sqrt(1-abar)   Ho et al. 2020, https://arxiv.org/abs/2006.11239
    Flow        1 - t,       t              Lipman et al. 2022, https://arxiv.org/abs/2210.02747
    TrigFlow    cos t,       sin t          Lu & Song 2024, https://arxiv.org/abs/2410.11081
    Bridge      1 - t,       (t (1-t))^1/2  to a known end, Liu et al. 2023 (below)

All conversions except those of eps-networks, whose definition divides by alpha, stay finite at
alpha = 0, where one-step students of flow models start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.choices import require_choices
from fewstep.diffusion.constants import beside

TIMESTEPS = 100_000
"""Of a path of discrete betas, whose table is held; published ones have a thousand."""

HOSTS = frozenset({"cpu"})
"""Kinds of devices whose numbers are read without waiting."""


class NoisePath(ABC):
    """t -> (alpha_t, sigma_t), both elementwise and differentiable in t.

    x_t = alpha_t x_0 + sigma_t eps; t = 0 is data, t grows with the noise, and [t_min, t_max] is
    the range that networks on the path are called at. A subclass defines `alpha` and `sigma`.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of x_0 at t: any shape -> the same shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor of eps at t: any shape -> the same shape."""

    def label(self, t: Tensor) -> Tensor:
        """The time input of a network on this path: t's shape -> the same shape.

        By default t itself; finite on [t_min, t_max], and mostly of order one.
        """
        return t

    @property
    def label_range(self) -> float:
        """label(t_max) - label(t_min): what differences of labels are compared with."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device="cpu")
        low, high = self.label(ends).tolist()
        return float(high - low)

    def flow_time(self, t: Tensor) -> Tensor:
        """tau = sigma_t / (alpha_t + sigma_t), the time of a rectified flow with as much noise.

        From 0 at the data to 1 at pure noise on every path; same shape as t.
        """
        sigma = self.sigma(t)
        return sigma / (self.alpha(t) + sigma)

    def time_of(self, tau: Tensor) -> Tensor:
        """The time t in [t_min, t_max] whose `flow_time` is nearest to tau; tau's shape.

        Found by bisection, in double precision, to the last bit of single precision.
        """
        low = torch.full_like(tau, self.t_min, dtype=torch.float64)
        high = torch.full_like(low, self.t_max)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.flow_time(middle) < tau
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(tau)

    def scale(self, t: Tensor) -> Tensor:
        """The divisor of x_t that flows are integrated with (`heun`); same shape as t.

        Along x_t / (a alpha + b sigma), for fixed a and b, fixed x_0 and eps make a straight line.
        The default, a = b = 1, is sized by the data at one end of the path and by the noise at the
        other.
        """
        return self.alpha(t) + self.sigma(t)

    def ddim(self, xt: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic step from t to s: x_s = alpha_s x_0 + sigma_s eps.

        Args:
            xt: (B, *), the samples at time t.
            x0: (B, *), the prediction at xt; eps = (x_t - alpha_t x_0) / sigma_t follows from
                both.
            t, s: (B,) or (), the times.

        Returns: x_s, (B, *). Exact where the prediction does not change between t and s. Finite at
        alpha_t = 0; at sigma_t = 0, where x_t is alpha_t x_0, the ratio sigma_s / sigma_t is taken
        as 1.

        Raises ValueError where the shapes do not fit. DDIM, Song et al. 2020,
        https://arxiv.org/abs/2010.02502, equation 12 with sigma = 0.
        """
        same_shape(xt=xt, x0=x0)
        alpha, sigma = coefficients(self, xt, t)
        alpha_s, sigma_s = coefficients(self, xt, s)
        ratio = torch.where(sigma > 0, sigma_s / torch.where(sigma > 0, sigma, 1), 1)
        return ratio * xt + (alpha_s - ratio * alpha) * x0

    def heun(self, xs: Tensor, x0: Tensor, next_x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The step from t to s to second order, from that of `ddim`.

        Heun's method (the trapezoid rule) for x / scale in sigma / scale, written as what it adds:

            scale_s / (2 scale_t) (alpha_s sigma_t / sigma_s - alpha_t) (next_x0 - x0)

        Args:
            xs: (B, *), the result of `ddim` from t to s.
            x0: (B, *), the prediction at time t.
            next_x0: (B, *), the prediction at xs and time s.
            t, s: (B,) or (), the times; sigma_s > 0.

        Returns: the corrected x_s, (B, *).

        Raises ValueError where the shapes do not fit. With VE's scale, 1, it is Karras et al.
        2022, https://arxiv.org/abs/2206.00364, algorithm 1.
        """
        same_shape(xs=xs, x0=x0, next_x0=next_x0)
        alpha, sigma = coefficients(self, xs, t)
        alpha_s, sigma_s = coefficients(self, xs, s)
        half = self.scale(expand(s, xs)) / self.scale(expand(t, xs)) / 2
        return xs + half * (alpha_s * sigma / sigma_s - alpha) * (next_x0 - x0)

    def bridge(self, xs: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Add noise from s to t >= s: x_t given x_s.

        x_t = r x_s + (sigma_t^2 - r^2 sigma_s^2)^(1/2) eps with r = alpha_t / alpha_s, so that an
        x_s of the path's law becomes an x_t of it.

        Args:
            xs: (B, *), the samples at time s.
            eps: (B, *), standard normal noise that is independent of xs.
            s, t: (B,) or (), the times.

        Returns: x_t, (B, *).

        Raises ValueError where t < s, since noise cannot be removed so, and where the shapes do
        not fit. On an accelerator, which is not waited for, x_t is NaN where t < s.
        """
        same_shape(xs=xs, eps=eps)
        alpha, sigma = coefficients(self, xs, t)
        alpha_s, sigma_s = coefficients(self, xs, s)
        # At alpha_s = 0 both are noise, and stay it.
        ratio = torch.where(alpha_s > 0, alpha / torch.where(alpha_s > 0, alpha_s, 1), 1)
        why = "noise is added from s to a later t, got t < s; `ddim` goes back"
        ratio = _later(t, s, ratio, why)
        added = (sigma - ratio * sigma_s) * (sigma + ratio * sigma_s)
        return ratio * xs + added.clamp(min=0).sqrt() * eps

    def ancestral(self, xt: Tensor, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """A draw of x_s given x_t and x_0, s <= t: the stochastic step back.

        The law of x_s when x_t was made from it by `bridge`. With r = alpha_t / alpha_s and
        tau^2 = sigma_t^2 - r^2 sigma_s^2, the variance that this added,

            x_s = (r sigma_s^2 x_t + alpha_s tau^2 x_0 + sigma_s tau sigma_t eps) / sigma_t^2.

        Args:
            xt: (B, *), the samples at time t.
            x0: (B, *), what they are the noise of.
            eps: (B, *), standard normal noise that is independent of both.
            t, s: (B,) or (), the times; sigma_t > 0.

        Returns: x_s, (B, *), with a gradient in x_t and x_0.

        Raises ValueError where t < s, and where the shapes do not fit; on an accelerator, which
        is not waited for, x_s is NaN where t < s. Ho et al. 2020,
        https://arxiv.org/abs/2006.11239, equation 7.
        """
        same_shape(xt=xt, x0=x0, eps=eps)
        alpha, sigma = coefficients(self, xt, t)
        alpha_s, sigma_s = coefficients(self, xt, s)
        ratio = torch.where(alpha_s > 0, alpha / torch.where(alpha_s > 0, alpha_s, 1), 1)
        ratio = _later(t, s, ratio, "a step back leads from t to an earlier s, got t < s")
        added = ((sigma - ratio * sigma_s) * (sigma + ratio * sigma_s)).clamp(min=0)
        mean = (ratio * sigma_s**2 * xt + alpha_s * added * x0) / sigma**2
        return mean + sigma_s / sigma * added.sqrt() * eps


def _later(t: Tensor, s: Tensor, ratio: Tensor, why: str) -> Tensor:
    """The ratio; a ValueError where t < s, or NaN on an accelerator, which is not waited for."""
    if t.is_meta:
        return ratio
    if t.device.type in HOSTS:
        if bool((t < s).any()):
            raise ValueError(why)
        return ratio
    return ratio.masked_fill((t < s).reshape(-1, *(1,) * (ratio.ndim - 1)), torch.nan)


@dataclass(frozen=True)
class VE(NoisePath):
    """alpha = 1, sigma = t: the EDM convention, t is the noise's standard deviation."""

    t_min: float = 0.002
    """Smallest time that networks are called at, a sigma above 0."""
    t_max: float = 80.0
    """Largest time that networks are called at, a sigma."""

    def alpha(self, t: Tensor) -> Tensor:
        """1, of t's shape."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def label(self, t: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return t.log() / 4

    def time_of(self, tau: Tensor) -> Tensor:
        """tau / (1 - tau), between t_min and t_max."""
        return (tau / (1 - tau)).clamp(self.t_min, self.t_max)

    def scale(self, t: Tensor) -> Tensor:
        """1: flows are integrated in sigma, as EDM's are."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Flow(NoisePath):
    """alpha = 1 - t, sigma = t: rectified flow; velocity v = eps - x_0."""

    t_min: float = 1e-3
    """Smallest time that networks are called at; 0 is the data."""
    t_max: float = 1.0
    """Largest time that networks are called at; 1 is pure noise."""

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def time_of(self, tau: Tensor) -> Tensor:
        """tau, between t_min and t_max."""
        return tau.clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class TrigFlow(NoisePath):
    """alpha = cos t, sigma = sin t, t in [0, pi/2]; here for data of unit scale."""

    t_min: float = 1e-3
    """Smallest time that networks are called at, an angle; 0 is the data."""
    t_max: float = math.pi / 2
    """Largest time that networks are called at, an angle; pi/2 is pure noise."""

    def alpha(self, t: Tensor) -> Tensor:
        """cos t."""
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        """sin t."""
        return t.sin()

    def time_of(self, tau: Tensor) -> Tensor:
        """The angle of (1 - tau, tau), between t_min and t_max."""
        return torch.atan2(tau, 1 - tau).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class Bridge(NoisePath):
    """alpha = 1 - t, sigma = std (t (1 - t))^(1/2): a Brownian bridge, around its known end.

    A bridge leads from data x_0 to an end x_T that is given with it, such as a blurred copy:

        y_t = (1 - t) x_0 + t x_T + std (t (1 - t))^(1/2) eps.

    What is not known of y_t is x_t = y_t - t x_T, a noise path of x_0 on which x_T is a condition
    of networks; E[x_0 | y_t, x_T] is E[x_0 | x_t, x_T]. At t = 1 nothing is left but x_T. Liu et
    al. 2023 (I2SB), https://arxiv.org/abs/2302.05872, with a constant rate of noise.
    """

    std: float = 1.0
    """How far bridges spread: sigma is half of it in the middle."""
    t_min: float = 1e-3
    """Smallest time that networks are called at; 0 is the data."""
    t_max: float = 0.999
    """Largest time that networks are called at; 1 is the known end."""

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"Bridge.std is positive and finite, got {self.std:g}")

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """std (t (1 - t))^(1/2), 0 at both ends."""
        return self.std * (t * (1 - t)).clamp(min=0).sqrt()

    def time_of(self, tau: Tensor) -> Tensor:
        """r / (std^2 + r) with r = (tau / (1 - tau))^2, between t_min and t_max."""
        return (tau**2 / (tau**2 + (self.std * (1 - tau)) ** 2)).clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class VP(NoisePath):
    """Variance preserving path of discrete betas; t is the timestep index 0 .. steps - 1.

    abar_i = prod_{j <= i} (1 - beta_j) at whole t, as in every DDPM scheduler; between two
    timesteps the log-SNR is interpolated linearly. `schedule` names how the betas run from
    `beta_start` to `beta_end`: "linear" in beta (DDPM, PixArt) or in sqrt(beta)
    ("scaled_linear": Stable Diffusion, the defaults). `betas` overrides them all. Note that
    sigma(0) is small but not zero: index 0 already carries one step of noise.
    """

    beta_start: float = 0.00085
    """The first beta, between 0 and 1."""
    beta_end: float = 0.012
    """The last beta, between 0 and 1."""
    steps: int = 1000
    """Number of timesteps, 2 to 100,000."""
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    """What runs evenly between the two: beta, or ("scaled_linear") its square root."""
    betas: tuple[float, ...] = ()
    """All betas, in place of the other four fields; (): those of `schedule`."""

    def __post_init__(self) -> None:
        if self.steps > TIMESTEPS or len(self.betas) > TIMESTEPS:
            raise ValueError(f"VP has at most {TIMESTEPS:,} timesteps, got {str(self)[:80]}")
        require_choices(self)
        if len(self.betas) == 1 or (not self.betas and self.steps < 2):
            raise ValueError("VP needs at least two timesteps")
        if not np.isfinite(self._table).all():
            raise ValueError(f"VP needs betas between 0 and 1, got {self}")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """0: the first timestep."""
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The last timestep, steps - 1."""
        return float(len(self.betas) or self.steps) - 1

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(abar_t); same shape as t."""
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - abar_t); same shape as t."""
        return (-self.log_snr(t)).sigmoid().sqrt()

    def label(self, t: Tensor) -> Tensor:
        """t / t_max, from 0 to 1."""
        return t / self.t_max

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha_t^2 / sigma_t^2), piecewise linear in t; same shape as t."""
        table = beside(torch.from_numpy(self._table), t)
        low = t.detach().floor().long().clamp(0, len(table) - 2)
        # Not table[low], which vmap refuses for single times.
        left, right = (table.index_select(0, (low + i).flatten()).view_as(t) for i in (0, 1))
        return torch.lerp(left, right, t - low)

    @cached_property
    def _table(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The log-SNR at whole t.

        Of numpy: tensors that are made within a transform of torch.func belong to it, and cannot
        be kept. `__post_init__` looks at it, so that it is there from the start.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.betas:
                beta = np.array(self.betas, dtype=np.float64)
            elif self.schedule == "linear":
                beta = np.linspace(self.beta_start, self.beta_end, self.steps)
            else:
                low, high = np.sqrt([self.beta_start, self.beta_end])
                beta = np.linspace(low, high, self.steps) ** 2
            log_abar = np.log1p(-beta).cumsum()
            return np.asarray(log_abar - np.log(-np.expm1(log_abar)))


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) or () reshaped to (B, 1, ..., 1) or () so that it broadcasts against x: (B, *)."""
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        shape = f"batch {t.shape[0]}" if t.ndim == 1 else f"shape {tuple(t.shape)}"
        raise ValueError(
            f"t has {shape} but x has batch {x.shape[0]}; expected t: (B,) or () for x: (B, ...)"
        )
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names the first tensor whose shape differs: no broadcasting."""
    names = iter(tensors.items())
    first, a = next(names)
    for name, b in names:
        if a.shape != b.shape:
            raise ValueError(
                f"{name} has shape {tuple(b.shape)} but {first} has shape {tuple(a.shape)}; "
                "they must be equal"
            )


def coefficients(path: NoisePath, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t), ready to broadcast against xt: (B, *)."""
    t = expand(t, xt)
    return path.alpha(t), path.sigma(t)


def rates(path: NoisePath, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma, d alpha/dt, d sigma/dt) at t, each of t's shape, by forward-mode autodiff."""
    t = t.contiguous()  # jvp refuses expanded tensors
    one = torch.ones_like(t)
    alpha, d_alpha = torch.func.jvp(path.alpha, (t,), (one,))  # type: ignore[misc]
    sigma, d_sigma = torch.func.jvp(path.sigma, (t,), (one,))  # type: ignore[misc]
    return alpha, sigma, d_alpha, d_sigma


def perturb(path: NoisePath, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Add noise to data: x_t = alpha_t x_0 + sigma_t eps.

    Args:
        path: the noise path.
        x0, eps: (B, *), data and standard normal noise.
        t: (B,) or (), the time.

    Returns: x_t, (B, *). Raises ValueError where the shapes do not fit.
    """
    same_shape(x0=x0, eps=eps)
    alpha, sigma = coefficients(path, x0, t)
    return alpha * x0 + sigma * eps


def x0_to_velocity(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = alpha' x_0 + sigma' eps along the probability flow; needs sigma_t > 0.

    xt, x0: (B, *), t: (B,) or () -> (B, *).
    """
    same_shape(xt=xt, x0=x0)
    alpha, sigma, d_alpha, d_sigma = rates(path, expand(t, xt))
    return d_alpha * x0 + d_sigma * (xt - alpha * x0) / sigma


def velocity_to_x0(path: NoisePath, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 from the velocity v = dx_t/dt, the inverse of `x0_to_velocity`.

    xt, v: (B, *), t: (B,) or () -> (B, *); finite at alpha_t = 0 and at sigma_t = 0.
    """
    same_shape(xt=xt, v=v)
    alpha, sigma, d_alpha, d_sigma = rates(path, expand(t, xt))
    return (d_sigma * xt - sigma * v) / (alpha * d_sigma - sigma * d_alpha)


def x0_to_eps(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """eps = (x_t - alpha x_0) / sigma; needs sigma_t > 0.

    xt, x0: (B, *), t: (B,) or () -> (B, *).
    """
    same_shape(xt=xt, x0=x0)
    alpha, sigma = coefficients(path, xt, t)
    return (xt - alpha * x0) / sigma


def eps_to_x0(path: NoisePath, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma eps) / alpha; needs alpha_t > 0.

    xt, eps: (B, *), t: (B,) or () -> (B, *).
    """
    same_shape(xt=xt, eps=eps)
    alpha, sigma = coefficients(path, xt, t)
    return (xt - sigma * eps) / alpha


def x0_to_v(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512).

    xt, x0: (B, *), t: (B,) or () -> (B, *); needs sigma_t > 0.
    """
    alpha, sigma = coefficients(path, xt, t)
    return alpha * x0_to_eps(path, xt, x0, t) - sigma * x0


def v_to_x0(path: NoisePath, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2); finite at alpha_t = 0.

    xt, v: (B, *), t: (B,) or () -> (B, *).
    """
    same_shape(xt=xt, v=v)
    alpha, sigma = coefficients(path, xt, t)
    return (alpha * xt - sigma * v) / (alpha**2 + sigma**2)


def x0_to_score(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Tweedie: grad log p(x_t) = (alpha x_0 - x_t) / sigma^2 for x_0 = E[x_0 | x_t].

    xt, x0: (B, *), t: (B,) or () -> (B, *); needs sigma_t > 0.
    """
    same_shape(xt=xt, x0=x0)
    alpha, sigma = coefficients(path, xt, t)
    return (alpha * x0 - xt) / sigma**2
