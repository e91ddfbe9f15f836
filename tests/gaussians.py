"""Closed forms for Gaussian data and an affine student, and quadrature to match.

Data x_0 ~ N(mu, Sigma), student x = a + B z. Along a path both stay Gaussian: q_t has mean
alpha mu and covariance M = alpha^2 Sigma + sigma^2 I, p_t has mean alpha a and covariance
N = alpha^2 B B^T + sigma^2 I, and the difference of scores s_p - s_q is affine,

    u(x) = P (x - alpha a) + m,    P = M^-1 - N^-1,    m = alpha M^-1 (a - mu).

Divergences are written as functions of (a, B) and differentiated by autograd, so no gradient
formula can be wrong here without a divergence being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, NoisePath, coefficients, perturb
from fewstep.diffusion.types import Cond
from fewstep.losses.distance import Distance
from fewstep.teachers.gaussian import Gaussian

F64 = torch.float64


def rows(*values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


@dataclass(frozen=True, eq=False)
class Setting:
    """Data, student and noise level."""

    mu: Tensor
    cov: Tensor
    a: Tensor
    b: Tensor
    t: float
    path: NoisePath = VE()

    @property
    def dim(self) -> int:
        return len(self.mu)

    @property
    def alpha(self) -> float:
        return float(self.path.alpha(torch.tensor(self.t, dtype=F64)))

    @property
    def sigma(self) -> float:
        return float(self.path.sigma(torch.tensor(self.t, dtype=F64)))

    def eye(self) -> Tensor:
        return torch.eye(self.dim, dtype=F64)

    def real(self) -> Gaussian:
        """The exact denoiser of the data."""
        return Gaussian(self.mu, self.cov, self.path)

    def fake(self) -> Gaussian:
        """The exact denoiser of the student's samples."""
        return Gaussian(self.a, self.b @ self.b.T, self.path)

    def q(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the noised data."""
        return self.alpha * self.mu, self.alpha**2 * self.cov + self.sigma**2 * self.eye()

    def p(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the noised samples of the student (a, b)."""
        return self.alpha * a, self.alpha**2 * b @ b.T + self.sigma**2 * self.eye()

    def u(self) -> Callable[[Tensor], Tensor]:
        """s_p - s_q at the setting's own (a, B): (n, D) -> (n, D)."""
        (mq, m), (mp, n) = self.q(), self.p(self.a, self.b)
        mi, ni = torch.linalg.inv(m), torch.linalg.inv(n)
        return lambda x: (x - mq) @ mi - (x - mp) @ ni


def example(t: float, path: NoisePath = VE()) -> Setting:
    """The three-dimensional case most tests use: no symmetry, correlated, p far from q."""
    return Setting(
        mu=rows(0.4, -0.7, 0.2),
        cov=rows([0.50, 0.12, -0.10], [0.12, 0.25, 0.07], [-0.10, 0.07, 0.35]),
        a=rows(0.1, 0.3, -0.2),
        b=rows([0.60, 0.25, -0.30], [-0.20, 0.75, 0.15], [0.35, -0.10, 0.45]),
        t=t,
        path=path,
    )


def golden(sigma: float) -> Setting:
    """The one-dimensional case of the golden table."""
    return Setting(rows(1.0), rows([0.25]), rows(0.2), rows([0.8]), sigma)


class GaussianFlowMap(nn.Module):
    """The exact flow map g(x_t, t, s) of one Gaussian N(mu, cov), on any path.

    With lam an eigenvalue of cov, o the offset x_t - alpha_t mu along its eigenvector and
    L = alpha^2 lam + sigma^2, the probability flow moves o to k o, k = (L_s / L_t)^(1/2), and

        g = mu + lam (alpha_s sigma_t + alpha_t sigma_s) / (L_t (k sigma_t + sigma_s)) o,

    which is (X - A x) / B of the jump X = A x + B g that `path.ddim` takes, without its 0 / 0 at
    s = t: k - A is written as (k^2 - A^2) / (k + A). s None is s = t, the denoiser.
    """

    input_names = ("s",)

    def __init__(self, teacher: Gaussian) -> None:
        super().__init__()
        self.teacher, self.path = teacher, teacher.path

    def forward(
        self, xt: Tensor, t: Tensor, cond: Cond = None, *, s: Tensor | None = None
    ) -> Tensor:
        """xt: (B, D), t and s: (B,) or () -> g: (B, D)."""
        (alpha, sigma), (alpha_s, sigma_s) = (
            coefficients(self.path, xt, u.to(xt)) for u in (t, t if s is None else s)
        )
        mu, lam, basis = (x[0].to(xt) for x in self.parts())
        before, after = alpha**2 * lam + sigma**2, alpha_s**2 * lam + sigma_s**2
        gain = lam * (alpha_s * sigma + alpha * sigma_s)
        gain = gain / (before * ((after / before).sqrt() * sigma + sigma_s))
        return mu + ((xt - alpha * mu) @ basis * gain) @ basis.T

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, eigenvalues and eigenvectors of the teacher, each with a first dimension of 1."""
        return self.teacher.means, self.teacher.variances, self.teacher.basis

    def jump(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X(x_t, t, s): (B, D)."""
        return self.path.ddim(xt, self(xt, t, s=s), t, s)


Divergence = Callable[[Setting, Tensor, Tensor], Tensor]


def fisher(s: Setting, a: Tensor, b: Tensor) -> Tensor:
    """E_p |s_p - s_q|^2 = tr(P N P) + |m|^2."""
    (mq, m), (mp, n) = s.q(), s.p(a, b)
    p = torch.linalg.inv(m) - torch.linalg.inv(n)
    shift = torch.linalg.solve(m, mp - mq)
    return torch.trace(p @ n @ p) + shift @ shift


def sampling_fisher(s: Setting, a: Tensor, b: Tensor) -> Tensor:
    """E_{p(a, B)} |u|^2 with u held at the setting's own student: only the samples move."""
    (_, m), (mp0, n0), (mp, n) = s.q(), s.p(s.a, s.b), s.p(a, b)
    p = torch.linalg.inv(m) - torch.linalg.inv(n0)
    mean = p @ (mp - mp0) + s.u()(mp0[None])[0]
    return torch.trace(p @ n @ p) + mean @ mean


def kl_divergence(s: Setting, a: Tensor, b: Tensor) -> Tensor:
    """KL(p_t || q_t)."""
    (mq, m), (mp, n) = s.q(), s.p(a, b)
    v = mp - mq
    trace = torch.trace(torch.linalg.solve(m, n)) + v @ torch.linalg.solve(m, v)
    return 0.5 * (trace - s.dim + torch.logdet(m) - torch.logdet(n))


def data_fisher(s: Setting, a: Tensor, b: Tensor) -> Tensor:
    """E_q |s_p - s_q|^2 = E_p[r |u|^2] with r = q/p, what Uni-Instruct integrates for KL(q||p)."""
    (mq, m), (mp, n) = s.q(), s.p(a, b)
    p = torch.linalg.inv(m) - torch.linalg.inv(n)
    mean = torch.linalg.solve(n, mp - mq)
    return torch.trace(p @ m @ p) + mean @ mean


def gradient(f: Divergence, s: Setting) -> Tensor:
    """(d/da, d/dB) of f at the setting's own student, flattened to one vector."""
    a, b = s.a.clone().requires_grad_(), s.b.clone().requires_grad_()
    return torch.cat([g.flatten() for g in torch.autograd.grad(f(s, a, b), (a, b))])


def sid_gradient(s: Setting, alpha: float) -> Tensor:
    """(sigma^4/alpha_t^2) [(1 - alpha) A + B/2]: A moves the samples, B the student's score."""
    moved = gradient(sampling_fisher, s)
    score = gradient(fisher, s) - moved
    return s.sigma**4 / s.alpha**2 * ((1 - alpha) * moved + score / 2)


def sim_gradient(s: Setting, distance: Distance, nodes: int = 40) -> Tensor:
    """grad of E_{x ~ sg[p]} d(s_p(x) - s_q(x)) = E d'(u)^T d s_p, by Gauss-Hermite quadrature."""
    points, weights = (torch.tensor(v, dtype=F64) for v in np.polynomial.hermite.hermgauss(nodes))
    grids = torch.meshgrid(*[points] * s.dim, indexing="ij")
    weight = torch.stack(torch.meshgrid(*[weights] * s.dim, indexing="ij")).prod(0).flatten()
    unit = torch.stack([g.flatten() for g in grids], 1) * 2**0.5
    mean, n = s.p(s.a, s.b)
    x = mean + unit @ torch.linalg.cholesky(n).T
    u = s.u()(x).requires_grad_()
    (slope,) = torch.autograd.grad(distance.value(u).sum(), u)

    def objective(s: Setting, a: Tensor, b: Tensor) -> Tensor:
        mean, n = s.p(a, b)
        score = -torch.linalg.solve(n, (x - mean).T).T
        return (weight * (slope * score).sum(1)).sum() / torch.pi ** (s.dim / 2)

    return gradient(objective, s)


class Mean(NamedTuple):
    """The mean of a per-sample parameter gradient, and of the loss itself."""

    gradient: Tensor
    value: float

    def misses(self, reference: Tensor) -> float:
        """Relative distance to a reference."""
        return float((self.gradient - reference).norm() / reference.norm())


class Sampled(NamedTuple):
    """What a per-sample loss may look at; x carries the gradient."""

    x: Tensor
    xt: Tensor
    real: Tensor
    fake: Tensor


Losses = Mapping[str, Callable[[Sampled], Tensor]]


def means(s: Setting, losses: Losses, nodes: int = 2) -> dict[str, Mean]:
    """Means over z and eps of the gradients in (a, B) of losses (n,), by Gauss-Hermite quadrature.

    From the loss to x the gradient is autograd's, through x_t and both denoisers. (z, eps) is
    turned so that x_t depends on its first D coordinates alone, which get `nodes` nodes each. In
    the others the integrands are quadratic, for which two nodes are exact, as they are in all of
    them where the loss is quadratic.
    """
    mixing = torch.cat([s.alpha * s.b, s.sigma * s.eye()], 1)
    turn = torch.linalg.qr(mixing.T, mode="complete").Q
    axes = [nodes] * s.dim + [2] * s.b.shape[1]
    rules = [np.polynomial.hermite.hermgauss(n) for n in axes]
    points = torch.cartesian_prod(*(torch.tensor(p, dtype=F64) for p, _ in rules)) * 2**0.5
    weight = torch.cartesian_prod(*(torch.tensor(w, dtype=F64) for _, w in rules)).prod(1)
    z, eps = (points @ turn.T).split([s.b.shape[1], s.dim], dim=1)
    t = torch.tensor(s.t, dtype=F64)
    x = (s.a + z @ s.b.T).requires_grad_()
    xt = perturb(s.path, x, eps, t)
    sampled = Sampled(x, xt, s.real()(xt, t), s.fake()(xt, t))
    found = {}
    for name, loss in losses.items():
        mean = (weight / weight.sum() @ _by_sample(loss(sampled), x, z)).detach()
        found[name] = Mean(mean[1:], float(mean[0]))
    return found


def _by_sample(value: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Losses (n,) beside their gradients in a and in B, the chain x = a + B z done by hand."""
    (g,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    return torch.cat([value[:, None], g, (g[:, :, None] * z[:, None]).flatten(1)], 1)
