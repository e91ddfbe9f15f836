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

All conversions except those of eps-networks, whose definition divides by alpha, stay finite at
alpha = 0, where one-step students of flow models start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

TIMESTEPS = 100_000
"""Of a path of discrete betas, whose table is held; published ones have a thousand."""


class NoisePath(ABC):
    """t -> (alpha_t, sigma_t), both elementwise, differentiable in t."""

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of x_0; same shape as t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The factor of eps; same shape as t."""

    def label(self, t: Tensor) -> Tensor:
        """What a network of this family is told of t; of order one, finite on [t_min, t_max]."""
        return t


@dataclass(frozen=True)
class VE(NoisePath):
    """alpha = 1, sigma = t: the EDM convention, t is the noise's standard deviation."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def label(self, t: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return t.log() / 4


@dataclass(frozen=True)
class Flow(NoisePath):
    """alpha = 1 - t, sigma = t: rectified flow; velocity v = eps - x_0."""

    t_min: float = 1e-3
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class TrigFlow(NoisePath):
    """alpha = cos t, sigma = sin t, t in [0, pi/2]; here for data of unit scale."""

    t_min: float = 1e-3
    t_max: float = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()


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
    beta_end: float = 0.012
    steps: int = 1000
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    betas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.steps > TIMESTEPS or len(self.betas) > TIMESTEPS:
            raise ValueError(f"VP has at most {TIMESTEPS:,} timesteps, got {str(self)[:80]}")
        if self.schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"VP.schedule is 'linear' or 'scaled_linear', got {self.schedule!r}")
        if len(self.betas) == 1 or (not self.betas and self.steps < 2):
            raise ValueError("VP needs at least two timesteps")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return float(len(self.betas) or self.steps) - 1

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def label(self, t: Tensor) -> Tensor:
        return t / self.t_max

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha_t^2 / sigma_t^2), piecewise linear in t; same shape as t."""
        table = _log_snr(self).to(device=t.device, dtype=t.dtype)
        low = t.detach().floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t - low)


@lru_cache(maxsize=16)
def _log_snr(path: VP) -> Tensor:
    f64 = torch.float64
    if path.betas:
        beta = torch.tensor(path.betas, dtype=f64)
    elif path.schedule == "linear":
        beta = torch.linspace(path.beta_start, path.beta_end, path.steps, dtype=f64)
    else:
        ends = math.sqrt(path.beta_start), math.sqrt(path.beta_end)
        beta = torch.linspace(*ends, path.steps, dtype=f64) ** 2
    log_abar = (-beta).log1p().cumsum(0)
    return log_abar - (-log_abar.expm1()).log()


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t: (B,) or () reshaped to (B, 1, ..., 1) or () so that it broadcasts against x: (B, *)."""
    if t.ndim == 0:
        return t
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        came = f"batch {t.shape[0]}" if t.ndim == 1 else f"shape {tuple(t.shape)}"
        raise ValueError(
            f"t has {came} but x has batch {x.shape[0]}; expected t: (B,) or () for x: (B, ...)"
        )
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def same_shape(**tensors: Tensor) -> None:
    """Refuse, by name, tensors whose shapes differ: silent broadcasting is never meant here."""
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
    """x_t = alpha_t x_0 + sigma_t eps; x0, eps: (B, *), t: (B,) or ()."""
    same_shape(x0=x0, eps=eps)
    alpha, sigma = coefficients(path, x0, t)
    return alpha * x0 + sigma * eps


def x0_to_velocity(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = alpha' x_0 + sigma' eps along the probability flow; needs sigma_t > 0."""
    same_shape(xt=xt, x0=x0)
    alpha, sigma, d_alpha, d_sigma = rates(path, expand(t, xt))
    return d_alpha * x0 + d_sigma * (xt - alpha * x0) / sigma


def velocity_to_x0(path: NoisePath, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Inverse of `x0_to_velocity`; finite at alpha_t = 0 and at sigma_t = 0."""
    same_shape(xt=xt, v=v)
    alpha, sigma, d_alpha, d_sigma = rates(path, expand(t, xt))
    return (d_sigma * xt - sigma * v) / (alpha * d_sigma - sigma * d_alpha)


def x0_to_eps(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """eps = (x_t - alpha x_0) / sigma; needs sigma_t > 0."""
    same_shape(xt=xt, x0=x0)
    alpha, sigma = coefficients(path, xt, t)
    return (xt - alpha * x0) / sigma


def eps_to_x0(path: NoisePath, xt: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_0 = (x_t - sigma eps) / alpha; needs alpha_t > 0."""
    same_shape(xt=xt, eps=eps)
    alpha, sigma = coefficients(path, xt, t)
    return (xt - sigma * eps) / alpha


def x0_to_v(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)."""
    alpha, sigma = coefficients(path, xt, t)
    return alpha * x0_to_eps(path, xt, x0, t) - sigma * x0


def v_to_x0(path: NoisePath, xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2); finite at alpha_t = 0."""
    same_shape(xt=xt, v=v)
    alpha, sigma = coefficients(path, xt, t)
    return (alpha * xt - sigma * v) / (alpha**2 + sigma**2)


def x0_to_score(path: NoisePath, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Tweedie: grad log p(x_t) = (alpha x_0 - x_t) / sigma^2 for x_0 = E[x_0 | x_t]."""
    same_shape(xt=xt, x0=x0)
    alpha, sigma = coefficients(path, xt, t)
    return (alpha * x0 - xt) / sigma**2
