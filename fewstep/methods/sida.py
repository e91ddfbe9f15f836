"""Adversarial Score identity Distillation (Zhou et al. 2024), https://arxiv.org/abs/2410.14919.

SiD can be no better than the teacher's scores. SiDA lets the fake score's encoder judge real
against generated samples as well (`fewstep.distillation.critic`), and the student answers to both:

    L = (1 - share) E w <delta, (f_psi - x) + (1 - alpha) delta>  +  share gan E w' softplus(-l),

l the critic's logits at the same x_t. Training starts with the critic alone, goes on as plain SiD,
and becomes adversarial last. SiD2A is SiDA with a SiD student to start from.

Few-step SiD's Diffusion-GAN (Zhou et al. 2025, https://arxiv.org/abs/2505.12674) is the same with
several steps, each sample judged by itself, and adversarial weights gamma_t = 4 + SNR_t:
`SiDA(FewStep(steps=4), fake=Critic(judging=SNR(), average="sample"), gan_weight=SNR())`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import (
    Matching,
    NoisedSamples,
    Predictions,
    Rollout,
    add_noise,
    predict_at,
)
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.score import sid
from fewstep.losses.weight import L1, Weight

LARGEST = 10.0
"""The student's logits are clamped to +- this, as published."""


@dataclass(frozen=True)
class SiDA(Method):
    """Adversarial score identity distillation: updates of the critic, then one of the student.

    The defaults are the published ones, but for the schedule, which counts steps here. It needs a
    teacher and real data. ValueError for a share outside [0, 1] and negative values. Zhou et al.
    2024, https://arxiv.org/abs/2410.14919.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5)
    alpha: float = 1.0
    """alpha: 0.5 is half the exact Fisher gradient, 1.0 is SIM with squared distance."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    weight: Weight = L1()
    """w, the weight of the score loss by noise level."""
    fake: Critic = Critic()
    """How the fake score learns to denoise and to judge: noise levels and weights of both
    losses."""
    gan: float = 1e-4
    """Weight of the adversarial term: the published scales 0.01 / 100."""
    gan_weight: Weight = L1()
    """w', the weight of the adversarial term by noise level."""
    share: float = 0.5
    """Share of the adversarial term in the loss once it has begun, 0 to 1."""
    student_from: int = 0
    """First step that updates the student (published: after 100,000 pictures)."""
    adversarial_from: int = 0
    """First step with the adversarial term (published: after 200,000 pictures). On a small problem
    a critic that has learnt nothing yet can drive the student apart; a later step prevents it."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""
    ratio: Updates = 1
    """Updates of the critic for one of the student, once it moves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"SiDA.share is between 0 and 1, got {self.share:g}")
        if min(self.gan, self.student_from, self.adversarial_from) < 0:
            raise ValueError(
                "SiDA.gan, student_from and adversarial_from are 0 or more, got "
                f"{self.gan:g}, {self.student_from} and {self.adversarial_from}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the critic's loss of a sample is weighted by the mean over the batch."""
        return self.fake.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score, and what `fake` judges with."""
        return self.fake.equipped(super().init(teacher, net), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """The critic alone before `student_from`, then `ratio` updates of it, and the student.

        The student's loss has its adversarial term from step `adversarial_from` on.
        """
        rollout = Rollout.at(step, self.sampler, self.matching)
        critic = self.fake.turns(rollout, self.guidance)
        if step < self.student_from:
            return critic
        loss = self.student_loss if step >= self.adversarial_from else self.score_loss
        return *self.fake_updates(*critic), Turn("student", partial(loss, rollout))

    def score_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """SiD's loss, without adversarial term; arguments as of `student_loss`."""
        x = rollout(nets, batch)
        n = add_noise(teacher.path, x, self.times, batch)
        p = self._predict(nets, teacher, batch, n, tap=False)
        return Loss(self._score(x, p).mean())

    def _predict(
        self, nets: Nets, teacher: Denoiser, batch: Batch, n: NoisedSamples, tap: bool
    ) -> Predictions:
        return predict_at(nets, teacher, batch, n, self.guidance, tap, self.fake.logvar)

    def _score(self, x: Tensor, p: Predictions) -> Tensor:
        weight = self.weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        return sid(x, p.real, p.fake, self.alpha, weight, p.own)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, score and adversarial terms from one pass through each network.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score", "adversarial" and "gan_loss".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        n, judge = add_noise(teacher.path, x, self.times, batch), self.fake.discriminator
        p = self._predict(nets, teacher, batch, n, tap=judge.net == "fake")
        score = self._score(x, p).mean()
        weight = self.gan_weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        kappas = self.guidance.scales(batch)
        cond = judge.condition(batch, kappas.fake, kappas.own)
        gan = judge.fool(nets, teacher, batch, n, cond, p.features, weight, LARGEST)
        total = (1 - self.share) * score + self.share * self.gan * gan.total
        return Loss(total, {"score": score, "adversarial": gan.total, "gan_loss": gan.gan_loss})
