"""Diff-Instruct (Luo et al. 2023), https://arxiv.org/abs/2305.18455.

The integral over noise levels of KL(student || teacher) has the gradient

    E w_t (f_psi - f_phi)^T dx/dtheta,    w_t = alpha^2 / sigma^2 for the exact KL,

a vector pushed on the samples, with no backward pass through either network. Variational score
distillation and DMD (Yin et al. 2024, https://arxiv.org/abs/2311.18828) follow the same vector
with other weights: `L1()` is DMD's normaliser, `Power()` is Diff-Instruct's own choice. With
`L1()` and several updates of the fake score for one of the student this is DMD2 before its GAN
(Yin et al. 2024, https://arxiv.org/abs/2405.14867).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.weight import Power, Weight


@dataclass(frozen=True)
class DiffInstruct(Method):
    """Diff-Instruct: `ratio` updates of the fake score, then one of the student.

    The published set-up: log-normal times for both losses, weight 1, sigma_init 1. It needs a
    teacher and no data. ValueError where ratio is below 1. Luo et al. 2023,
    https://arxiv.org/abs/2305.18455.
    """

    sampler: Sampler = FewStep(t_init=1.0)
    times: TimeLaw = LogNormal()
    """Noise levels of the student's loss."""
    weight: Weight = Power()
    """w of the student's direction."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL direction; teacher and fake score run without a graph.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        return Loss(kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance))
