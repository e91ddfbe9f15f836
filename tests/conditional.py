"""Class-conditional Gaussians with affine denoisers, and the gradients of guided losses in them.

Data of class c ~ N(mu_c, Sigma_c), a student x = a_c + B_c z, and "no class" as one more
Gaussian: all denoisers are affine in x_t, f(x_t, c) = A_c x_t + b_c, hence so is every guided
one. With R x_t + r, F x_t + f and O x_t + o the teacher under kappa_4 and the fake score under
kappa_2 and kappa_3, and x_t of mean m = alpha a and covariance N = alpha^2 B B^T + sigma^2 I,
score-identity losses are quadratic forms in (z, eps). With delta = D x_t + d, D = R - F:

    E <delta, f_psi,k3 - x>  =  <D m + d, O m + o - a> + tr(D N O^T - alpha D B B^T)
    E |delta|^2              =  |D m + d|^2 + tr(D N D^T).

Networks are frozen, so that the gradient of these expressions in (a, B) alone is what the
gradient of the loss must be on average; autograd takes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, NoisePath
from tests.gaussians import Setting

F64 = torch.float64
CLASSES, DIM = 2, 3


class Map(NamedTuple):
    """x -> A x + b."""

    a: Tensor
    b: Tensor


class Conditional(nn.Module):
    """Exact denoisers of N(means_c, covs_c), c = 0 .. C - 1, and of one Gaussian without class.

    Remembers how it was called, and has an encoder tap whose features tell the condition.
    """

    def __init__(self, means: Tensor, covs: Tensor, path: NoisePath = VE()) -> None:
        super().__init__()
        self.means, self.covs, self.path = means, covs, path
        self.calls: list[str] = []

    def map(self, t: float, label: int) -> Map:
        """The denoiser of one class at time t; label C: none."""
        at = torch.tensor(t, dtype=F64)
        alpha, sigma, mu, cov = (
            *(self.path.alpha(at), self.path.sigma(at)),
            *(self.means[label], self.covs[label]),
        )
        eye = torch.eye(len(mu), dtype=F64)
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * eye)
        return Map(gain, mu - alpha * gain @ mu)

    def guided(self, t: float, label: int, kappa: float) -> Map:
        """(1 - kappa) f(., none) + kappa f(., label)."""
        none, one = self.map(t, len(self.means) - 1), self.map(t, label)
        return Map(*((1 - kappa) * n + kappa * o for n, o in zip(none, one, strict=True)))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self._answer("forward", xt, t, cond)[0]

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self._answer("encode", xt, t, cond)[1]

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self._answer("both", xt, t, cond)

    def _answer(self, call: str, xt: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """One time for all samples."""
        self.calls.append(f"{call} {'none' if cond is None else 'cond'}")
        none = len(self.means) - 1
        label = torch.full((len(xt),), none) if cond is None else cond
        maps = [self.map(float(t.flatten()[0]), c) for c in range(none + 1)]
        a, b = (torch.stack(each)[label] for each in zip(*maps, strict=True))
        return (a @ xt[..., None])[..., 0] + b, xt + label[:, None]


class Affine(nn.Module):
    """The student a_c + B_c z, z = x_t / sigma_t being what `FewStep` starts from."""

    def __init__(self, a: Tensor, b: Tensor, path: NoisePath = VE()) -> None:
        super().__init__()
        self.a, self.b, self.path = nn.Parameter(a.clone()), nn.Parameter(b.clone()), path

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        z = xt / self.path.sigma(t)[:, None]
        return self.a[cond] + (self.b[cond] @ z[..., None])[..., 0]

    def gradient(self) -> Tensor:
        """Of both, as one vector; forgotten afterwards."""
        grads = [p.grad for p in (self.a, self.b) if p.grad is not None]
        self.a.grad = self.b.grad = None
        return torch.cat([g.flatten() for g in grads])


class Scene(NamedTuple):
    """Teacher, fake score and student of two classes at one noise level."""

    teacher: Conditional
    fake: Conditional
    student: Affine
    t: float

    def setting(self, label: int) -> Setting:
        """The case of one class, if the fake score hears it."""
        parts = self.teacher.means, self.teacher.covs, self.student.a, self.student.b
        return Setting(*(p.detach()[label] for p in parts), self.t, self.teacher.path)

    def gradient(
        self, loss: str, kappas: tuple[float, float, float], alpha: float = 1.0
    ) -> Tensor:
        """Of E "sid" (summed over dimensions) under (kappa_2, kappa_3, kappa_4), or of "kl"."""
        a = self.student.a.detach().clone().requires_grad_()
        b = self.student.b.detach().clone().requires_grad_()
        expected = self.sid if loss == "sid" else self.kl
        share = [expected(c, kappas, a[c], b[c], alpha) for c in range(CLASSES)]
        grads = torch.autograd.grad(torch.stack(share).mean(), (a, b))
        return torch.cat([g.flatten() for g in grads])

    def maps(self, label: int, kappas: tuple[float, float, float]) -> tuple[Map, Map, Map]:
        """delta under (kappa_2, kappa_4), the fake score under kappa_2 and under kappa_3."""
        real = self.teacher.guided(self.t, label, kappas[2])
        fake, own = (self.fake.guided(self.t, label, k) for k in kappas[:2])
        return Map(real.a - fake.a, real.b - fake.b), fake, own

    def sid(
        self, label: int, kappas: tuple[float, float, float], a: Tensor, b: Tensor, alpha: float
    ) -> Tensor:
        """The two displayed expectations, the second times 1 - alpha."""
        s = self.setting(label)
        delta, _, own = self.maps(label, kappas)
        (mean, n), spread = s.p(a, b), b @ b.T
        mean_delta, mean_own = delta.a @ mean + delta.b, own.a @ mean + own.b - a
        cross = torch.trace(delta.a @ n @ own.a.T - s.alpha * delta.a @ spread)
        square = mean_delta @ mean_delta + torch.trace(delta.a @ n @ delta.a.T)
        return mean_delta @ mean_own + cross + (1 - alpha) * square

    def kl(
        self, label: int, kappas: tuple[float, float, float], a: Tensor, b: Tensor, alpha: float
    ) -> Tensor:
        """Its gradient is -E delta^T dx: <.,.> of (a, B) with -E delta and -E delta z^T."""
        s = self.setting(label)
        delta, _, _ = self.maps(label, kappas)
        push = delta.a @ (s.alpha * s.a) + delta.b
        return -(push @ a) - (delta.a @ (s.alpha * s.b) * b).sum()


def scene(t: float = 0.75, path: NoisePath = VE()) -> Scene:
    """No symmetry anywhere; the fake score is exact for each class, and arbitrary without one."""
    generator = torch.Generator().manual_seed(7)
    means = 0.7 * torch.randn(CLASSES + 1, DIM, dtype=F64, generator=generator)
    roots = torch.randn(2, CLASSES + 1, DIM, DIM, dtype=F64, generator=generator) / 2
    covs, own = (r @ r.mT + 0.1 * torch.eye(DIM, dtype=F64) for r in roots)
    a = 0.7 * torch.randn(CLASSES + 1, DIM, dtype=F64, generator=generator)
    teacher, fake = Conditional(means, covs, path), Conditional(a, own, path)
    b = torch.linalg.cholesky(own[:CLASSES])
    return Scene(teacher, fake, Affine(a[:CLASSES], b, path), t)
