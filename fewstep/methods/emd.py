"""EM distillation (Xie et al. 2024), https://arxiv.org/abs/2405.16852.

The student is trained by maximum likelihood: KL(q_t || p_t), which covers modes, where DMD and its
kin have the reverse. With x_t = alpha g(z) + sigma eps its gradient is that of a regression on
pairs (x_t, z) of the teacher's x_t and the latents that could have made it,

    rho(x_t, z) = q_t(x_t) p(z | x_t),    -(alpha / sigma) E_rho[eps^T dg(z)]        (M step),

and such pairs come from the student's own by Langevin steps in (eps, z) (E step): with
D = s_phi - s_psi = (alpha / sigma^2) (f_phi - f_psi) at x_t,

    eps <- eps + gamma_eps (sigma D - eps) + sqrt(2 gamma_eps) n,
    z   <- z + gamma_z (alpha J_g^T D - z) + sqrt(2 gamma_z) n',

from z, eps ~ N(0, I), and J_g^T D a product that one backward pass through the student gives. One
step with z at rest is the gradient of KL(p_t || q_t), VSD's; many lead to KL(q_t || p_t); a few
are in between. The noise that eps carries has mean zero as long as z rests, and a large variance;
with `cancel` it is kept beside the chain and taken off, so that the student sees the drift alone.
Once z moves this is a small bias towards narrow students.

The vector is divided by 1 - (1 - gamma_eps)^K, the share of eps that K steps renew, and told in
units of predictions: w = 1 and K = 1 is f_psi - f_phi. gamma_z is made smaller at low noise, where
z is stiff: `z_rate` sigma^2 / (sigma^2 + alpha^2 sigma_data^2), which is this library's choice.
The paper's text was not at hand; its step sizes could not be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import (
    FakeScore,
    NoisedSamples,
    Predictions,
    add_noise,
    predict_at,
)
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, Weight


class Chain(NamedTuple):
    """Where the Langevin steps end: z and eps, the noise that eps carries, and the weight.

    All (B, *) or broadcast against it; none has a gradient.
    """

    z: Tensor
    eps: Tensor
    carried: Tensor
    weight: Tensor
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class EMD(Method):
    """EM distillation: one update of the fake score, then one of the student.

    It needs a teacher and no data, and a sampler of one call. ValueError for another sampler, and
    for values out of range. Xie et al. 2024, https://arxiv.org/abs/2405.16852.
    """

    sampler: Sampler = FewStep(2.5)
    times: TimeLaw = Karras(tmax=500.0)
    """Noise levels of the student's loss."""
    weight: Weight = L1()
    """w of the student's direction, at the start of the chain; Power(2, -2) is exact."""
    steps: int = 8
    """K, Langevin steps (published: 8 and 16)."""
    eps_rate: float = 0.1
    """gamma_eps, the size of a Langevin step of eps, above 0 and at most 1."""
    z_rate: float = 0.02
    """gamma_z, the size of a Langevin step of z at high noise, from 0 (z rests) to 1."""
    sigma_data: float = 0.5
    """How far samples move with z, below which noise makes z stiff."""
    cancel: bool = True
    """Whether the noise that eps carries is taken off."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler.calls != 1:
            raise ValueError(f"EMD distils one call, but its sampler makes {self.sampler.calls}")
        if self.steps < 1 or not 0 < self.eps_rate <= 1 or not 0 <= self.z_rate <= 1:
            raise ValueError(
                "EMD needs steps >= 1, 0 < eps_rate <= 1 and 0 <= z_rate <= 1, got "
                f"{self.steps}, {self.eps_rate:g} and {self.z_rate:g}"
            )
        if self.sigma_data < 0:
            raise ValueError(f"EMD.sigma_data is 0 or more, got {self.sigma_data:g}")

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the fake score, then one of the student."""
        return self.fake.turn(self.sampler, self.guidance), Turn("student", self.student_loss)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, its samples of the chain's latents pushed by the chain's noise.

        Args:
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning; logs "push",
        the mean absolute direction, and "latent", the mean square of z at the chain's end.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        end = self.chain(nets, teacher, batch)
        x = self.generate(nets, end.z, batch)
        noise = end.eps - end.carried if self.cancel else end.eps
        renewed = 1 - (1 - self.eps_rate) ** self.steps
        push = -end.weight * end.sigma / end.alpha * noise / renewed
        logs = {"push": push.abs().mean(), "latent": (end.z**2).mean()}
        return Loss(kl(x, torch.zeros_like(x), push).mean(), logs)

    def generate(self, nets: Nets, z: Tensor, batch: Batch) -> Tensor:
        """g(z), with a gradient in z: (B, *)."""
        student: Any = nets["student"]
        return self.sampler(student, z, batch.cond, batch.draws)

    def chain(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Chain:
        """The Langevin steps in (eps, z)."""
        draws = need_draws(batch).under("langevin")
        z = batch.z
        with torch.no_grad():
            first = self.generate(nets, z, batch)
            n = add_noise(teacher.path, first, self.times, batch)
            weight = torch.ones_like(n.sigma)
        eps = (n.xt - n.alpha * first) / n.sigma
        carried, high = eps, n.sigma**2
        z_rate = self.z_rate * high / (high + n.alpha**2 * self.sigma_data**2)
        shape = tuple(z.shape[1:])
        for k in range(self.steps):
            p, x, pull = self.difference(nets, teacher, batch, z, eps, n)
            if k == 0:
                weight = self.weight(x, p.real, n.alpha, n.sigma)
            drift = n.alpha / n.sigma * (p.real - p.fake)
            new = (2 * self.eps_rate) ** 0.5 * draws.normal(f"eps{k}", shape).to(eps)
            eps = eps + self.eps_rate * (drift - eps) + new
            carried = (1 - self.eps_rate) * carried + new
            if pull is not None:
                new = (2 * z_rate).sqrt() * draws.normal(f"z{k}", shape).to(z)
                z = z + z_rate * (pull - z) + new
        return Chain(z, eps, carried, weight, n.alpha, n.sigma)

    def difference(
        self,
        nets: Nets,
        teacher: Denoiser,
        batch: Batch,
        z: Tensor,
        eps: Tensor,
        n: NoisedSamples,
    ) -> tuple[Predictions, Tensor, Tensor | None]:
        """The predictions at alpha g(z) + sigma eps, g(z), and alpha J_g^T D unless z rests.

        No result has a gradient.
        """
        with torch.set_grad_enabled(self.z_rate > 0):
            latent = z.detach().requires_grad_(self.z_rate > 0)
            x = self.generate(nets, latent, batch)
        with torch.no_grad():
            moved = n._replace(xt=n.alpha * x + n.sigma * eps)
            p = predict_at(nets, teacher, batch, moved, self.guidance)
        same_shape(x=x, real=p.real, fake=p.fake)
        if not self.z_rate:
            return p, x, None
        d = n.alpha**2 / n.sigma**2 * (p.real - p.fake)
        (pull,) = torch.autograd.grad(x, latent, d.to(x))
        return p, x.detach(), pull
