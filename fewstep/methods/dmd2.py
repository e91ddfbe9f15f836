"""Improved distribution matching distillation (Yin et al. 2024), https://arxiv.org/abs/2405.14867.

The student is pushed along the gradient of KL(student || teacher), one vector a sample, evened out
over noise levels (DMD, https://arxiv.org/abs/2311.18828, equations 7 and 8):

    (f_psi - f_phi) / mean |x - f_phi|,    no backward pass through either network.

DMD2 drops DMD's regression on the teacher's samples. What it needs instead is a fake score that
is up to date, by `ratio` updates for each of the student's (two time scales); a GAN loss against
real data, gan * softplus(-l), at a noise level and with noise of its own; and, for several calls,
samples made as the student makes them at inference (backward simulation, which is `Rollout`).

The logits l are those of a small learned head on the fake score's encoder
(`fewstep.distillation.discriminator_head`), which is trained in the same updates; `fake.pool`
chooses another, such as SiDA's mean over channels. On Stable Diffusion the published head reads
the middle block's output, the head here its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import Matching, Rollout, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.weight import L1, Power, Weight


@dataclass(frozen=True)
class DMD2(Method):
    """DMD2: `ratio` updates of the fake score and discriminator, then one of the student.

    The defaults are those of ImageNet 64: from sigma = 80, levels 20 to 980 of EDM's 1000. It
    needs a teacher and real data. ValueError where ratio is below 1 or gan negative. Yin et al.
    2024, https://arxiv.org/abs/2405.14867.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=80.0)
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's score loss."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake: Critic = Critic(
        Karras(), judging=Power(), scale=245.76, average="sample", pool="learned"
    )
    """The fake score and the discriminator; the scale is the published 0.01, twice (real and fake
    are summed) times 64 * 64 * 3."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    gan: float = 3e-3
    """Weight of the student's adversarial loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan < 0:
            raise ValueError(f"DMD2.gan is 0 or more, got {self.gan:g}")

    @property
    def couples_samples(self) -> bool:
        """Whether the critic's loss of a sample is weighted by the mean over the batch."""
        return self.fake.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score, and what `fake` judges with."""
        return self.fake.equipped(super().init(teacher, net), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score with its discriminator, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        critic = self.fake.turns(rollout, self.guidance)
        return *self.fake_updates(*critic), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL direction and the adversarial loss.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score" and "gan_loss".

        No graph is kept of teacher and fake score in the KL direction; the adversarial term has
        times and noise of its own. Raises ValueError where the batch has no draws, or guidance
        meets no conditions.
        """
        x = rollout(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        apart = batch._replace(draws=need_draws(batch).under("gan"))
        judge = self.fake.discriminator
        n = judge.noised(teacher.path, x, apart)
        cond = judge.condition(batch, self.guidance.scales(batch).fake)
        gan = judge.fool(nets, teacher, apart, n, cond)
        return Loss(score + self.gan * gan.total, {"score": score, "gan_loss": gan.gan_loss})
