"""Adversarial self-distillation (Yang et al. 2025), https://arxiv.org/abs/2511.01419.

One student for any number of calls up to N. Fewer calls are farther from the teacher, and its
scores are a rough guide there; the student's own result after one call more is a near one. Beside
the direction of DMD, a GAN tells what the student makes in n calls from what it makes in n + 1:

    L_G = L_DMD(x^(n))  +  alpha E softplus(l_n(sg x'^(n+1)) - l_n(x^(n))),
    L_D = E softplus(l_n(x^(n)) - l_n(x'^(n+1)))  +  r1 / 2 |grad l|^2  +  r2 / 2 |grad l|^2,

a relativistic loss of pairs with both gradient penalties, as R3GAN has it (Huang et al. 2024,
https://arxiv.org/abs/2501.05441). x and x' come from different noise, and are judged with
different noise. x^(n) is the n-th prediction on one ladder of N times, n drawn anew in each step;
after the last call, n = N, there is only DMD. The l_n are heads of their own on the frozen fake
score, which all of them read.

The better side has no gradient for the student, since the formula as printed would pull x^(n+1)
towards x^(n) too. alpha, r1 and r2 could not be found, and those here are guesses. Fewer calls are
those at the first times of the ladder, so that a student trained here with four is sampled by
`FewStep(times=(...))` of the first one, two or three. Giving the first frame of a film more calls
than the others is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore, Rollout, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class ASD(Method):
    """Adversarial self-distillation: the fake score, the discriminator of n calls, the student.

    It needs a teacher with encoder features (`fewstep.diffusion.encoder_features`), and no data.
    ValueError for a sampler of one call, and for values out of range. Yang et al. 2025,
    https://arxiv.org/abs/2511.01419.
    """

    sampler: Sampler = FewStep(t_init=2.5, steps=4)
    """How the finished net generates, in N calls, the most that the student makes."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's score loss."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    judge: Discriminator = Discriminator(
        features="frozen_fake",
        loss="relativistic",
        penalty=GradientPenalty(0.01, 0.01),
        share_noise=False,
    )
    """What tells n calls from n + 1; its heads are counted by the method."""
    alpha: float = 0.1
    """Weight of the adversarial loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler.calls < 2 or not self.sampler.trainable:
            raise ValueError(
                f"ASD.sampler makes two calls or more, each of which can be trained; got "
                f"{self.sampler}"
            )
        if self.alpha < 0:
            raise ValueError(f"ASD.alpha is 0 or more, got {self.alpha:g}")
        if self.judge.features not in ("teacher", "frozen_fake") or self.judge.heads != 1:
            raise ValueError(
                "ASD.judge reads the 'frozen_fake' score or the 'teacher', and its heads are "
                f"counted by the method; got {self.judge}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def judge_of(self, n: int) -> Discriminator:
        """What tells n calls from n + 1."""
        return replace(self.judge, heads=self.sampler.calls - 1, head=n - 1)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score, and the heads that judge."""
        return self.judge_of(1).equipped(super().init(teacher, net), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then of what judges n calls, and of the student.

        After the last call nothing judges.
        """
        rollout = Rollout.at(step, self.sampler, "uniform")
        fake = self.fake_updates(self.fake.turn(rollout, self.guidance))
        student = Turn("student", partial(self.student_loss, rollout))
        if rollout.k == self.sampler.calls:
            return *fake, student
        return *fake, Turn("discriminator", partial(self.judge_loss, rollout)), student

    @torch.no_grad()
    def one_more(self, rollout: Rollout, nets: Nets, batch: Batch) -> Tensor:
        """x'^(n+1), from noise of its own: (B, *)."""
        draws = need_draws(batch).under("one more")
        z = draws.normal("z", batch.z.shape[1:]).to(batch.z)
        after = Rollout(self.sampler, rollout.k + 1)
        return after(nets, batch._replace(z=z, draws=draws))

    def judge_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss; arguments as of `student_loss`, logs as of the judge."""
        judge = self.judge_of(rollout.k)
        with torch.no_grad():
            x = rollout(nets, batch)
        pair = judge.pair(teacher.path, x, self.one_more(rollout, nets, batch), batch)
        return judge.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL direction and the adversarial loss.

        Args:
            rollout: makes the student's samples x^(n), (B, *).
            nets: the "student", the "fake" score and the "discriminator".
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score" and, but after the last call, "gan_loss".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        if rollout.k == self.sampler.calls:
            return Loss(score, {"score": score})
        judge = self.judge_of(rollout.k)
        apart = batch._replace(
            draws=need_draws(batch).under("gan"), x0=self.one_more(rollout, nets, batch)
        )
        n = judge.noised(teacher.path, x, apart)
        gan = judge.fool(nets, teacher, apart, n, batch.cond)
        return Loss(score + self.alpha * gan.total, {"score": score, "gan_loss": gan.gan_loss})
