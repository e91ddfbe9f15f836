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
from functools import partial

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, predict
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.distance import Distance, PseudoHuber
from fewstep.losses.score import sim
from fewstep.losses.weight import Power, Weight


@dataclass(frozen=True)
class SIM(Method):
    """Score implicit matching: `ratio` updates of the fake score, then one of the student.

    The default distance is the paper's, pseudo-Huber, on x_0-space differences; the paper's c and
    time law are not published. It needs a teacher and no data. Luo et al. 2024,
    https://arxiv.org/abs/2410.16794.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    distance: Distance = PseudoHuber()
    """d of the difference between the fake score's prediction and the teacher's."""
    scale: Weight = Power()
    """k, the units in which the distance measures: Power() for x_0, Power(1, -2) for scores."""
    weight: Weight = Power()
    """w, a further weight of the loss by noise level."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student."""

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, theorem 3.1; no prediction is detached.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        p = predict(nets, teacher, batch, x, self.times, self.guidance)
        scale = self.scale(x, p.real, p.alpha, p.sigma)
        weight = self.weight(x, p.real, p.alpha, p.sigma)
        return Loss(sim(x, p.real, p.fake, self.distance, scale, weight, p.own).mean())
