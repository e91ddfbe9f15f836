"""f-distill (Xu et al. 2025), https://arxiv.org/abs/2502.15681.

DMD2 follows the gradient of the reverse KL divergence, which drops modes. Any f-divergence
between teacher q_t and student p_t has a gradient along the same direction, with each sample
weighted by h(r) = r^2 f''(r) at the density ratio r = q_t(x_t) / p_t(x_t)
(`fewstep.losses.f_divergence`):

    h(r) (f_psi - f_phi) / mean |x - f_phi|,    no backward pass through r or either network.

The discriminator gives the ratio: at its optimum its logit is log r. It is read at the same x_t
and t as the predictions. As E_p r = 1 at every noise level, r is divided by its mean over the
samples of its level, and h by its mean over all (`fewstep.distillation.density_ratio`). Everything
else is DMD2, with the adversarial loss at the same noised samples.

The paper clips r before it is normalised; here the normalised r is clipped, which changes less.
The logits are those of the discriminator on the fake score's features (the paper: the teacher's).
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
from fewstep.distillation.density_ratio import follow, read_ratio, require_ratio, with_statistics
from fewstep.distillation.fake_score import Matching, Rollout, add_noise, predict_at
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.f_divergence import Family, f_divergence
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, Power, Weight


@dataclass(frozen=True)
class FDistill(Method):
    """f-distill: `ratio` updates of the fake score and discriminator, then one of the student.

    The defaults are DMD2's for ImageNet 64, with the Jensen-Shannon divergence. It needs a teacher
    and real data. ValueError for values out of range. Xu et al. 2025,
    https://arxiv.org/abs/2502.15681.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=80.0)
    family: Family = "js"
    """The divergence: reverse_kl (DMD2's), kl, js, softened, hellinger, jeffreys, neyman or
    pearson."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's losses."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake: Critic = Critic(
        Karras(), judging=Power(), scale=245.76, average="sample", pool="learned"
    )
    """The fake score and the discriminator; the scale is DMD2's."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    gan: float = 1e-3
    """Weight of the student's adversarial loss."""
    clip: tuple[float, float] = (0.1, 20.0)
    """The smallest and largest normalised density ratio."""
    bins: int = 10
    """Noise levels that r is normalised at, of equal mass in `times`."""
    rate: float = 0.0
    """What the statistics keep of their old value in a step (published: 0, or 0.5)."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fake.discriminator.log_ratio(torch.zeros(()))
        require_ratio(self, self.clip, self.bins, self.rate)
        if self.gan < 0:
            raise ValueError(f"FDistill.gan is 0 or more, got {self.gan:g}")

    @property
    def couples_samples(self) -> bool:
        """Whether the critic's loss of a sample is weighted by the mean over the batch."""
        return self.fake.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score with its discriminator head, and the statistics of r."""
        return with_statistics(self.fake.equipped(super().init(teacher, net), teacher), self.bins)

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score with its discriminator, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        critic = self.fake.turns(rollout, self.guidance)
        return *self.fake_updates(*critic), Turn("student", partial(self.student_loss, rollout))

    def after_step(self, step: Step) -> None:
        """The means of r and h follow those of the step's samples."""
        super().after_step(step)
        follow(step, self.rate)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the weighted KL direction and the adversarial loss.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student", the "fake" score and the "statistics" of r.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score", "gan_loss", "ratio" (the mean r) and
        "clipped" (the share of samples whose r is clipped); sums "count", "ratio" and "h".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        n = add_noise(teacher.path, x, self.times, batch)
        with torch.no_grad():
            p = predict_at(nets, teacher, batch, n, self.guidance)
            weight = self.weight(x, p.real, p.alpha, p.sigma)
        judge = self.fake.discriminator
        cond = judge.condition(batch, self.guidance.scales(batch).fake)
        gan = judge.fool(nets, teacher, batch, n, cond)
        with torch.no_grad():
            statistics: Any = nets["statistics"]
            u = need_draws(batch).uniform("t")  # of the times of `add_noise`
            r = read_ratio(statistics, judge.log_ratio(gan.logits.mean(1)), u, self.clip)
            h = f_divergence(self.family).h(r.kept)
            scaled = (h / statistics.h.to(h)).reshape(weight.shape[:1] + (1,) * (x.ndim - 1))
        score = kl(x, p.real, p.fake, weight * scaled).mean()
        logs = {"score": score, "gan_loss": gan.gan_loss, **r.logs}
        return Loss(score + self.gan * gan.total, logs, r.sums(self.bins, h))
