"""Diff-Instruct (Luo et al. 2023), https://arxiv.org/abs/2305.18455.

The integral over noise levels of KL(student || teacher) has the gradient

    E w_t (f_psi - f_phi)^T dx/dtheta,    w_t = alpha^2 / sigma^2 for the exact KL,

a vector pushed on the samples, with no backward pass through either network. Variational score
distillation and DMD (Yin et al. 2024, https://arxiv.org/abs/2311.18828) follow the same vector
with other weights: `L1()` is DMD's normaliser, `Power()` is Diff-Instruct's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewstep.core import Batch, Denoiser, Loss, Method, Nets, Sampler, Turn
from fewstep.fake_score import FakeScore, generate, predict
from fewstep.losses.score import kl
from fewstep.losses.weight import Power, Weight
from fewstep.sample import FewStep
from fewstep.times import LogNormal, TimeLaw


@dataclass(frozen=True)
class DiffInstruct(Method):
    """The published set-up: log-normal times for both losses, weight 1, sigma_init 1."""

    sampler: Sampler = FewStep(t_init=1.0)
    times: TimeLaw = LogNormal()
    """Noise levels of the student's loss."""
    weight: Weight = Power()
    """w of the student's direction."""
    fake: FakeScore = FakeScore()

    def turns(self, step: int) -> Sequence[Turn]:
        return self.fake.turn(self.sampler), Turn("student", self.student_loss)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The KL direction; both networks run without a graph."""
        x = generate(nets, self.sampler, batch)
        with torch.no_grad():
            real, fake, alpha_t, sigma_t = predict(nets, teacher, batch, x, self.times)
            weight = self.weight(x, real, alpha_t, sigma_t)
        return Loss(kl(x, real, fake, weight).mean())
