"""Inverse bridge matching distillation (Gushchin et al. 2025), https://arxiv.org/abs/2502.01362.

A bridge model restores: from a degraded picture x_T it makes the picture x_0, along Brownian
bridges between the two (`fewstep.diffusion.noise_path.Bridge`),

    y_t = (1 - t) x_0 + t x_T + sigma_t eps,    f_phi(y_t, t, x_T) = E[x_0 | y_t, x_T],

in many calls. A student x = G(x_T, z) should do so in one. It is right if bridges from x_T to its
own x have the teacher for their regression; what it lacks is how much worse the teacher explains
them than their own regression f_psi does (the inverse problem of bridge matching):

    L = E w |f_phi(y_t) - x|^2  -  min_psi E w |f_psi(y_t) - x|^2  =  E w |f_phi - f_psi|^2.

f_psi learns the second term on the student's bridges, then the student descends both with psi
held: as psi is a minimum, it adds nothing to the gradient, which flows through x, and through y_t
into both networks. That is twice score identity distillation at alpha = 1/2
(https://arxiv.org/abs/2404.04057), on bridges.

A bridge is a noise path of x_t = y_t - t x_T, and x_T a condition of all networks (the conditional
bridges of the paper). So nothing here asks what the path is: on another one this is
`SiD(alpha=0.5)`. A network of its own input y_t alone, without x_T, is one that adds t x_T to x_t
first. The student's input has the share of x_0 left out, which is not known: t_init is near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fewstep.diffusion.noise_path import Bridge, NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw, Uniform
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, predict
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.score import denoising
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class IBMD(Method):
    """Inverse bridge matching: `ratio` updates of the bridge of the student, one of the student.

    Its defaults are for teachers on a `Bridge`. It needs a teacher and conditions that tell x_T,
    and no data. ValueError where ratio is below 1. Gushchin et al. 2025, https://arxiv.org/abs/2502.01362.
    """

    paths: ClassVar[tuple[type[NoisePath], ...]] = (Bridge,)
    sampler: Sampler = FewStep(t_init=0.9)
    times: TimeLaw = Uniform(0.02, 0.98)
    """Times of the student's loss."""
    weight: Weight = L1()
    """w of the student's loss; L1, 1 / mean |x - f_phi|, is SiD's."""
    fake: FakeScore = FakeScore(Uniform(0.02, 0.98))
    """How f_psi, the fake score, learns: the times and the weight of its loss."""
    ratio: Updates = 1
    """Updates of f_psi for one of the student."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for teachers of labels; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of f_psi, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the difference of two regressions; no prediction is detached.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score, f_psi.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "explained", the regression of f_psi.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        p = predict(nets, teacher, batch, x, self.times, self.guidance)
        weight = self.weight(x, p.real, p.alpha, p.sigma)
        by_teacher = denoising(p.real, x, weight).mean()
        by_fake = denoising(p.fake, x, weight).mean()
        return Loss(by_teacher - by_fake, {"explained": by_fake})
