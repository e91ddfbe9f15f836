"""Score identity Distillation (Zhou et al. 2024), https://arxiv.org/abs/2404.04057.

A one-step student x = G(z) should have the teacher's distribution at every noise level. With
f_phi the teacher's denoiser, f_psi the student's own (the fake score), delta = f_phi - f_psi,
the Fisher divergence between both is E (alpha^2/sigma^4) |delta|^2. Its gradient cannot be taken
directly, since psi depends on the student. Score identities give a loss that can (equation 23):

    L = E w_t <delta, (f_psi - x) + (1 - alpha) delta>.

The student's gradient flows through x and through x_t into both frozen networks. Fake score and
student alternate, one update each, the fake score first. No real data are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.core import Batch, Denoiser, Loss, Method, Nets, Sampler, Turn
from fewstep.fake_score import FakeScore, generate, predict
from fewstep.losses.score import sid
from fewstep.losses.weight import L1, Weight
from fewstep.sample import FewStep
from fewstep.times import Karras, TimeLaw


@dataclass(frozen=True)
class SiD(Method):
    """The defaults are the published ones: alpha 1.2, sigma_init 2.5, tmax 800, L1 weight."""

    sampler: Sampler = FewStep(t_init=2.5)
    alpha: float = 1.2
    """0.5 is half the exact Fisher gradient, 1.0 is SIM with squared distance."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    weight: Weight = L1()
    """w of the student's loss."""
    fake: FakeScore = FakeScore()

    def turns(self, step: int) -> Sequence[Turn]:
        return self.fake.turn(self.sampler), Turn("student", self.student_loss)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """Equation 23; no prediction is detached."""
        x = generate(nets, self.sampler, batch)
        real, fake, alpha_t, sigma_t = predict(nets, teacher, batch, x, self.times)
        weight = self.weight(x, real, alpha_t, sigma_t)
        return Loss(sid(x, real, fake, self.alpha, weight).mean())
