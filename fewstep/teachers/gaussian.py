"""Exact teachers: Gaussians and Gaussian mixtures, known in closed form at every noise level.

Data x_0 ~ sum_k pi_k N(mu_k, Sigma_k) stays a mixture along any path,
x_t ~ sum_k pi_k N(alpha mu_k, alpha^2 Sigma_k + sigma^2 I), so that density, score, denoiser and
samples are exact; for one Gaussian so is the probability flow. Distilling them needs no training
of a teacher and no data, and the distance of a student to the truth can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, NoisePath, x0_to_velocity
from fewstep.diffusion.types import Cond


def _tensor(x: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.as_tensor(x) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)


class GaussianMixture(nn.Module):
    """sum_k weights_k N(means_k, covs_k) as an exact `Denoiser` of vectors (B, D).

    Args:
        means: (K, D).
        covs: (K, D, D), (K, D) diagonals, or () one variance for all.
        weights: (K,) positive numbers, normalised here; None: equal ones.
        path: the noise path.

    With labels as `cond` ((B,) int64; K is the null label) it is class-conditional: component k
    alone. Raises ValueError where shapes do not fit, weights are not positive, or covs are not
    positive definite.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        covs: Tensor | Sequence[Sequence[float]] | float,
        weights: Tensor | Sequence[float] | None = None,
        path: NoisePath = VE(),
    ) -> None:
        super().__init__()
        self.path = path
        means = _tensor(means)
        if means.ndim != 2:
            raise ValueError(f"means must be (K, D), got shape {tuple(means.shape)}")
        count, dim = means.shape
        cov = torch.tensor(covs).to(means) if isinstance(covs, float) else _tensor(covs).to(means)
        if cov.ndim == 0:
            cov = cov.expand(count, dim)
        if cov.ndim == 2:
            cov = torch.diag_embed(cov)
        if cov.shape != (count, dim, dim):
            raise ValueError(f"covs {tuple(cov.shape)} do not fit means {tuple(means.shape)}")
        weight = torch.ones(count) if weights is None else _tensor(weights)
        if weight.shape != (count,) or not bool((weight > 0).all()):
            raise ValueError(f"weights must be {count} positive numbers, got {weights}")
        variances, basis = torch.linalg.eigh(cov.double())
        if not bool((variances > 0).all()):
            raise ValueError("covs must be positive definite")
        self.means: Tensor
        self.variances: Tensor
        self.basis: Tensor
        self.log_weights: Tensor
        self.register_buffer("means", means)
        self.register_buffer("variances", variances.to(means))
        self.register_buffer("basis", basis.to(means))
        self.register_buffer("log_weights", (weight / weight.sum()).log().to(means))

    @classmethod
    def ring(
        cls,
        count: int = 8,
        radius: float = 1.0,
        std: float = 0.1,
        path: NoisePath = VE(),
    ) -> GaussianMixture:
        """`count` equal round components on a circle in the plane.

        radius: of the circle around 0; std: standard deviation of a component along each axis.
        """
        angle = torch.arange(count) * (2 * math.pi / count)
        return cls(radius * torch.stack([angle.cos(), angle.sin()], 1), std**2, path=path)

    def _whitened(self, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets in each component's eigenbasis (B, K, D), variances there, alpha: (B, 1, 1)."""
        t = t.to(xt).expand(len(xt))[:, None, None]
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        offset = torch.einsum("bkd,kde->bke", xt[:, None] - alpha * self.means, self.basis)
        return offset, alpha**2 * self.variances + sigma**2, alpha

    def _log_joint(self, offset: Tensor, variance: Tensor, cond: Cond) -> Tensor:
        """log pi_k + log N_k(x_t): (B, K); with labels, the label's component alone."""
        quad = (offset**2 / variance + variance.log()).sum(-1)
        prior = self.log_weights.expand(len(offset), -1)
        if cond is not None:
            count = len(self.means)
            other = cond[:, None] != torch.arange(count, device=cond.device)
            prior = prior.masked_fill(other & (cond[:, None] < count), -math.inf).log_softmax(1)
        return prior - 0.5 * (quad + offset.shape[-1] * math.log(2 * math.pi))

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """E[x_0 | x_t]: xt (B, D), t (B,) or () -> (B, D); exact under autocast too."""
        with torch.autocast(xt.device.type, enabled=False):
            offset, variance, alpha = self._whitened(xt, t)
            posterior = self._log_joint(offset, variance, cond).softmax(1)
            shrunk = alpha * self.variances / variance * offset
            mean = self.means + torch.einsum("bke,kde->bkd", shrunk, self.basis)
            return (posterior[..., None] * mean).sum(1)

    def log_prob(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """log p_t(x_t): xt (B, D), t (B,) or () -> (B,)."""
        offset, variance, _ = self._whitened(xt, t)
        return self._log_joint(offset, variance, cond).logsumexp(1)

    def score(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """grad log p_t(x_t): xt (B, D), t (B,) or () -> (B, D), in closed form."""
        alpha, sigma = self.path.alpha(t.to(xt)), self.path.sigma(t.to(xt))
        alpha, sigma = (c[:, None] if c.ndim else c for c in (alpha, sigma))
        out: Tensor = (alpha * self(xt, t, cond) - xt) / sigma**2
        return out

    def sample(
        self, count: int, generator: torch.Generator | None = None, cond: Cond = None
    ) -> Tensor:
        """`count` exact samples of x_0: (count, D); `generator` is torch's global one by default.

        cond: (count,) int64, the component of each sample; by default drawn by weight.
        """
        if cond is None:
            p = self.log_weights.exp()
            cond = torch.multinomial(p, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator).to(self.means)
        scaled = noise * self.variances[cond].sqrt()
        return self.means[cond] + torch.einsum("be,bde->bd", scaled, self.basis[cond])

    def flow(self, xt: Tensor, t: float, s: float, steps: int = 256, cond: Cond = None) -> Tensor:
        """The probability-flow map from time t to s: xt (B, D) -> (B, D).

        Closed form for one Gaussian; for a mixture, `steps` steps of classical Runge-Kutta of
        order four on the exact velocity: uniform in log t where sigma_t is unbounded (t, s > 0),
        else in the angle theta of (alpha, sigma), from which r = x / (alpha^2 + sigma^2)^(1/2)
        moves by dr / dtheta = (cos theta r - f) / sin theta, finite from data to pure noise.
        """
        if len(self.means) == 1:
            return self._gaussian_flow(xt, t, s)
        ends = torch.tensor([t, s], dtype=torch.float64)
        alpha, sigma = self.path.alpha(ends), self.path.sigma(ends)
        unbounded = bool(self.path.sigma(torch.full_like(ends, self.path.t_max)).max() > 2)
        u = ends.log() if unbounded else torch.atan2(sigma, alpha)
        size = torch.ones(2) if unbounded else torch.hypot(alpha, sigma)
        nodes = torch.linspace(float(u[0]), float(u[1]), 2 * steps + 1, dtype=torch.float64)
        share = nodes.sin() / (nodes.sin() + nodes.cos())
        times = nodes.exp() if unbounded else self.path.time_of(share)
        along = self._along_log_t if unbounded else self._along_angle

        def v(x: Tensor, k: int) -> Tensor:
            return along(x, nodes[k].to(x), times[k].to(x), cond)

        x, h = xt / size[0].to(xt), float(u[1] - u[0]) / steps
        for k in range(0, 2 * steps, 2):
            k1 = v(x, k)
            k2 = v(x + h / 2 * k1, k + 1)
            k3 = v(x + h / 2 * k2, k + 1)
            k4 = v(x + h * k3, k + 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x * size[1].to(xt)

    def _along_log_t(self, x: Tensor, _: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """dx / dlog t at t ()."""
        return t * x0_to_velocity(self.path, x, self(x, t, cond), t)

    def _along_angle(self, r: Tensor, theta: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """dr / dtheta at the angle theta (), which is at time t (); zero at the data."""
        if float(theta) < 1e-9:
            return torch.zeros_like(r)
        size = torch.hypot(self.path.alpha(t), self.path.sigma(t))
        out: Tensor = (theta.cos() * r - self(size * r, t, cond)) / theta.sin()
        return out

    def _gaussian_flow(self, xt: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """alpha_s mu + Q sqrt(lambda_s / lambda_t) Q^T (x_t - alpha_t mu)."""
        at_t, at_s = (torch.as_tensor(u, dtype=xt.dtype, device=xt.device) for u in (t, s))
        offset, var_t, _ = self._whitened(xt, at_t)
        var_s = self.path.alpha(at_s) ** 2 * self.variances + self.path.sigma(at_s) ** 2
        moved = torch.einsum("bke,kde->bkd", offset * (var_s / var_t).sqrt(), self.basis)
        return self.path.alpha(at_s) * self.means[0] + moved[:, 0]


class Gaussian(GaussianMixture):
    """N(mean, cov) as an exact `Denoiser`; mean: (D,), cov: (D, D), (D,) or a float variance."""

    def __init__(
        self,
        mean: Tensor | Sequence[float],
        cov: Tensor | Sequence[float] | float,
        path: NoisePath = VE(),
    ) -> None:
        covs = cov if isinstance(cov, float) else _tensor(cov)[None]
        super().__init__(_tensor(mean)[None], covs, path=path)
