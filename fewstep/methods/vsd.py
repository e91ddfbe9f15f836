"""SwiftBrush (Nguyen & Tran 2023), https://arxiv.org/abs/2312.05239.

Variational score distillation (Wang et al. 2023, ProlificDreamer,
https://arxiv.org/abs/2305.16213) makes one picture, or one scene, follow a teacher's scores.
SwiftBrush puts a one-step student x = G(z) in the picture's place: prompts go in, no image is ever
looked at. The student is pushed along the gradient of KL(student || teacher), weighted by

    sigma_t^2 (eps_phi - eps_psi) = alpha_t sigma_t (f_psi - f_phi),

which with alpha^2 + sigma^2 = 1 is sigma^3 / alpha times the exact gradient. No backward pass runs
through either network. Both predictions are guided by the same scale, `Kappas(fake=4.5, real=4.5)`
(`LSG` has it where the fake score learns, too): guidance of the teacher alone would be a bias that
the fake score cannot follow, and push a student away that has the teacher's very distribution.
Student first, then one update of the fake score.

The published fake score is the teacher with adapters, `fewstep distill --lora`, on one backbone
in memory, and learns 1000 times faster than the student (`fake_rate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.losses.weight import EDMWeight, SignalNoise, Weight


@dataclass(frozen=True)
class VSD(Method):
    """Variational score distillation of a student: one update of it, then one of the fake score.

    The defaults suit EDM teachers; on Stable Diffusion 2.1 the paper has
    `FewStep(999, unit=True)`, times `Whole(20, 980)`, `FakeScore(Whole(), Power(4, -2))`,
    guidance `Kappas(fake=4.5, real=4.5)` and fake_rate 1000, with adapters of rank 64. It needs a
    teacher and no data. ValueError where fake_rate is not positive. Nguyen & Tran 2023,
    https://arxiv.org/abs/2312.05239.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's loss: 20 to 980 of a thousand."""
    weight: Weight = SignalNoise()
    """w of the student's direction, alpha sigma where alpha^2 + sigma^2 = 1."""
    fake: FakeScore = FakeScore(Karras(), EDMWeight())
    """How the fake score learns: the noise levels and the weight of its loss."""
    fake_rate: float = 1.0
    """Learning rate of the fake score over the student's (published: 1000, of adapters)."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fake_rate <= 0:
            raise ValueError(f"VSD.fake_rate is positive, got {self.fake_rate:g}")

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, then one of the fake score on the new student's samples."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)._replace(rate=self.fake_rate)
        return Turn("student", partial(self.student_loss, rollout)), fake

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the weighted KL direction; no network is run with a graph but it.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning; nothing
        further is logged.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        return Loss(kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance))
