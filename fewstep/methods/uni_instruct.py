"""Uni-Instruct (Wang et al. 2025), https://arxiv.org/abs/2505.20755.

Along a path with alpha = 1 any f-divergence between the laws of teacher q_0 and student p_0 is a
sum of weighted Fisher divergences at all noise levels ("expansion"): with r = q_t(x_t) / p_t(x_t),
u = s_psi - s_phi and h(r) = r^2 f''(r),

    D_f(q_0 || p_0) = 1/2 int E_p[h(r) |u|^2] d sigma^2.

h = 1 is the reverse KL divergence, which SiD follows at alpha = 1/2; h = r is KL, which covers
modes; h = 1 + r, their sum, is Jeffreys', and 2 r^2 is chi-squared. The student has to be
differentiated as the law p in the expectation, in r, and in u, which the score identity makes

    L = E w <delta, h (f_psi - x) + (h - r h') / 2 delta>,    delta = f_phi - f_psi

(`fewstep.losses.f_divergence.expanded`; w = alpha^2 / sigma^4 is exact). The gradient flows
through x and through x_t into both networks, as in SiD, and into r: for KL the loss is r times
SiD's with alpha = 1, of which a detached r would give about half the gradient. r comes from a
discriminator on the fake score's encoder, as in SiDA, but its gradient in x_t does not: it is
r (s_phi - s_psi), which both networks know better, without another backward pass. It is bounded
(`slope`), since networks that err at low noise make it as large as 1 / sigma^2. r is divided by
its mean at each noise level, and h by its mean over all (`fewstep.distillation.density_ratio`).

The student also faces the discriminator, with a small weight. Training may start with the critic
alone, and go on with SiD's loss before the divergence, as the paper's does.

The released code has r detached, the weights 0.4 and 0.6 for the parts of Jeffreys', and SiD's
alpha = 1 in both of them. Where laws are far apart a low noise level alone may push the student
away from the data (js and hellinger); it is the sum over levels that is the divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.critic import Critic
from fewstep.distillation.density_ratio import (
    along_scores,
    follow,
    read_ratio,
    require_ratio,
    with_statistics,
)
from fewstep.distillation.fake_score import Matching, Rollout, add_noise, predict_at
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.losses.f_divergence import Family, expanded, f_divergence
from fewstep.losses.score import sid
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class UniInstruct(Method):
    """Uni-Instruct: one update of the critic, then one of the student.

    It needs a teacher and real data. ValueError for an unknown divergence, a discriminator whose
    logits do not tell a ratio, and values out of range. Wang et al. 2025,
    https://arxiv.org/abs/2505.20755.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5)
    divergence: Family = "jeffreys"
    """The divergence: reverse_kl (SiD's at alpha = 1/2), kl, jeffreys, pearson (chi-squared), js,
    softened, hellinger or neyman."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the student's loss."""
    weight: Weight = L1()
    """w, the weight of the divergence by noise level."""
    fake: Critic = Critic(average="sample")
    """The fake score and the discriminator."""
    gan: float = 1e-4
    """Weight of the student's adversarial loss (published: 0.01 / 100)."""
    gan_weight: Weight = L1()
    """w, the weight of the adversarial loss by noise level."""
    clip: tuple[float, float] = (0.1, 20.0)
    """The smallest and largest normalised density ratio; beyond, r has no gradient."""
    slope: float = 3.0
    """The largest gradient of log r, times (alpha^2 + sigma^2)^(1/2); a huge number bounds none,
    which is exact for exact scores."""
    bins: int = 10
    """Noise levels that r is normalised at, of equal mass in `times`."""
    rate: float = 0.9
    """What the means of r and h keep of their old value in a step."""
    student_from: int = 0
    """First step that updates the student (published: after 100,000 pictures)."""
    divergence_from: int = 0
    """First step with the divergence, after SiD's loss at alpha = 1 (published: after 200,000
    pictures)."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fake.discriminator.log_ratio(torch.zeros(()))
        require_ratio(self, self.clip, self.bins, self.rate)
        if min(self.gan, self.student_from, self.divergence_from) < 0 or not self.slope >= 0:
            raise ValueError(
                "UniInstruct needs gan, student_from, divergence_from and slope of 0 or more, got "
                f"{self.gan:g}, {self.student_from}, {self.divergence_from} and {self.slope:g}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the critic's loss of a sample is weighted by the mean over the batch."""
        return self.fake.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score with what judges, and the statistics of r."""
        return with_statistics(self.fake.equipped(super().init(teacher, net), teacher), self.bins)

    def turns(self, step: int) -> Sequence[Turn]:
        """The critic alone before `student_from`, then critic and student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        critic = self.fake.turns(rollout, self.guidance)
        if step < self.student_from:
            return critic
        loss = self.student_loss if step >= self.divergence_from else self.score_loss
        return *critic, Turn("student", partial(loss, rollout))

    def after_step(self, step: Step) -> None:
        """The means of r and h follow those of the step's samples."""
        follow(step, self.rate)

    def score_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """SiD's loss at alpha = 1, without ratio; arguments as of `student_loss`."""
        x = rollout(nets, batch)
        n = add_noise(teacher.path, x, self.times, batch)
        p = predict_at(nets, teacher, batch, n, self.guidance, logvar=self.fake.logvar)
        weight = self.weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        return Loss(sid(x, p.real, p.fake, 1.0, weight, p.own).mean())

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the expanded divergence and the adversarial loss.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student", the "fake" score and the "statistics" of r.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score" (the divergence's loss, whose value means
        nothing), "gan_loss", "ratio" (the mean r) and "clipped" (the share of samples whose r is
        clipped); sums "count", "ratio" and "h".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        n, judge = add_noise(teacher.path, x, self.times, batch), self.fake.discriminator
        tap = judge.net == "fake"
        p = predict_at(nets, teacher, batch, n, self.guidance, tap, self.fake.logvar)
        kappas = self.guidance.scales(batch)
        cond = judge.condition(batch, kappas.fake, kappas.own)
        weight = self.gan_weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        gan = judge.fool(nets, teacher, batch, n, cond, p.features, weight)

        statistics: Any = nets["statistics"]
        log_ratio = along_scores(judge.log_ratio(gan.logits.mean(1)), n, p, self.slope)
        u = need_draws(batch).uniform("t")  # of the times of `add_noise`
        r = read_ratio(statistics, log_ratio, u, self.clip)
        divergence = f_divergence(self.divergence)
        weight = self.weight(x, p.real, p.alpha, p.sigma) * p.precision_weight
        weight = weight / statistics.h.to(weight)
        score = expanded(divergence, r.kept, x, p.real, p.fake, weight, p.own).mean()
        logs = {"score": score, "gan_loss": gan.gan_loss, **r.logs}
        return Loss(score + self.gan * gan.total, logs, r.sums(self.bins, divergence.h(r.kept)))
