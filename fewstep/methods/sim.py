"""Score Implicit Matching (Luo et al. 2024), https://arxiv.org/abs/2410.16794.

For any distance d between scores, the gradient of E d(s_psi - s_phi) with the sampling law held
fixed equals that of a loss that can be computed (theorem 3.1), in x_0 terms

    L = -E w d'(y)^T k (f_psi - x),    y = k (f_psi - f_phi).

The squared distance gives twice SiD at alpha = 1. The paper's choice, pseudo-Huber, normalises
itself: y / sqrt(|y|^2 + c^2), with the gradient flowing through the normaliser too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.core import Batch, Denoiser, Loss, Method, Nets, Sampler, Turn
from fewstep.fake_score import FakeScore, generate, predict
from fewstep.losses.distance import Distance, PseudoHuber
from fewstep.losses.score import sim
from fewstep.losses.weight import Power, Weight
from fewstep.sample import FewStep
from fewstep.times import Karras, TimeLaw


@dataclass(frozen=True)
class SIM(Method):
    """Pseudo-Huber on x_0-space differences; the paper's c and time law are not published."""

    sampler: Sampler = FewStep(t_init=2.5)
    distance: Distance = PseudoHuber()
    scale: Weight = Power()
    """k, the units in which the distance measures: Power() for x_0, Power(1, -2) for scores."""
    weight: Weight = Power()
    """w, a further factor."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    fake: FakeScore = FakeScore()

    def turns(self, step: int) -> Sequence[Turn]:
        return self.fake.turn(self.sampler), Turn("student", self.student_loss)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """Theorem 3.1; no prediction is detached."""
        x = generate(nets, self.sampler, batch)
        real, fake, alpha_t, sigma_t = predict(nets, teacher, batch, x, self.times)
        scale = self.scale(x, real, alpha_t, sigma_t)
        weight = self.weight(x, real, alpha_t, sigma_t)
        return Loss(sim(x, real, fake, self.distance, scale, weight).mean())
