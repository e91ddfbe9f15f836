"""Score identity Distillation (Zhou et al. 2024), https://arxiv.org/abs/2404.04057.

A one-step student x = G(z) should have the teacher's distribution at every noise level. With
f_phi the teacher's denoiser, f_psi the student's own (the fake score), delta = f_phi - f_psi,
the Fisher divergence between both is E (alpha^2/sigma^4) |delta|^2. Its gradient cannot be taken
directly, since psi depends on the student. Score identities give a loss that can (equation 23):

    L = E w_t <delta, (f_psi - x) + (1 - alpha) delta>.

The student's gradient flows through x and through x_t into both frozen networks. Fake score and
student alternate, one update each, the fake score first. No real data are used.

With `guidance=LSG(1.5)` and a conditional teacher this is SiD-LSG (Zhou et al. 2024,
https://arxiv.org/abs/2406.01561), with `FewStep(steps=4)` few-step SiD, and with `ZeroCFG()` or
`AntiCFG()` its guidance-free forms (Zhou et al. 2025, https://arxiv.org/abs/2505.12674).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import (
    FakeScore,
    Matching,
    Rollout,
    Samples,
    SharedRollout,
    predict,
)
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.score import sid
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class SiD(Method):
    """Score identity distillation: `ratio` updates of the fake score, then one of the student.

    The defaults are the published ones: alpha 1.2, sigma_init 2.5, tmax 800, L1 weight. It needs a
    teacher and no data. Zhou et al. 2024, https://arxiv.org/abs/2404.04057.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    alpha: float = 1.2
    """alpha: 0.5 is half the exact Fisher gradient, 1.0 is SIM with squared distance."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    weight: Weight = L1()
    """w, the weight of the student's loss by noise level."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""
    shared: bool = False
    """Whether both halves of a step learn on the same samples: cheaper, but with half as many."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared and self.ratio != 1:
            raise ValueError(f"SiD.ratio is 1 where samples are shared, got {self.ratio}")

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        if self.shared:
            made = SharedRollout(rollout)
            student = Turn("student", partial(self.student_loss, made))
            return made.turns(self.fake, self.guidance, student)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Samples, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, equation 23; no prediction is detached.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        p = predict(nets, teacher, batch, x, self.times, self.guidance, logvar=self.fake.logvar)
        weight = self.weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        return Loss(sid(x, p.real, p.fake, self.alpha, weight, p.own).mean())
