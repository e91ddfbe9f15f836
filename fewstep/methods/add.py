"""Adversarial diffusion distillation (Sauer et al. 2023), https://arxiv.org/abs/2311.17042.

Real data x_0 with noise, at one of the student's times s, are denoised in one call,

    x = G(x_s, s),    x_s = alpha_s x_0 + sigma_s eps, but pure noise at the first time,

and judged beside data in a frozen vision network F, of decoded pictures, by a head D_k on each of
several layers; the teacher pulls at them too (equations 1 to 4):

    L_G = -sum_k E D_k(F_k(x))  +  distil E c(t) |x - sg f_phi(sg x_t, t)|^2,
    L_D = sum_k E relu(1 - D_k(F_k(x_0))) + relu(1 + D_k(F_k(x))) + r1 |grad_F D_k(F_k(x_0))|^2,

the sums over heads being means here, L_D half of that, and the square a mean over dimensions. c is
alpha_t ("exponential", which is one on EDM's path) or, for score distillation sampling,
`Power(1, -1)` up to a factor. That term alone is no divergence: on a Gaussian its gradient is
2 (1 - k) (a - mu) and 2 (1 - k) b for samples a + b z, k = V / (V + sigma^2), so that it shrinks
the data's own law to a point. The adversarial term is what keeps their spread.

F is `judge.features`: published is DINOv2 ViT-S (`VisionFeatures`); digits have `DigitFeatures`.
By default it is the teacher, which knows its data and needs no decoder. Not here: the heads'
conditions, a text's embedding and that of the student's input picture, and c of NFSD.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.call_inputs import (
    call_input,
    call_times,
    require_few_steps,
    require_shares,
)
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import add_noise
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.distillation.pictures import pictures_of
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.score import denoising
from fewstep.losses.weight import Power, Weight


@dataclass(frozen=True)
class ADD(Method):
    """ADD: one update of the discriminator's heads, then one of the student.

    It needs a teacher and data; with `pictures`, or a judge of pictures, samples that are pictures
    or a teacher that decodes them. ValueError for another sampler than `FewStep`, for a
    discriminator that reads a fake score, and for values out of range. Sauer et al. 2023,
    https://arxiv.org/abs/2311.17042.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5)
    """A `FewStep`; published are four calls, of which one, two or four can be made."""
    shares: tuple[float, ...] = ()
    """How often each of the student's calls is trained, the noisiest first; (): all alike."""
    judge: Discriminator = Discriminator(
        None, loss="hinge", penalty=GradientPenalty(1e-5, of="features")
    )
    """What tells data from samples; F is its `features`."""
    distil: float = 2.5
    """Weight of the distillation, lambda."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the distillation (published: uniform over the teacher's timesteps)."""
    weight: Weight = Power(1, 0)
    """c, the weight of the distillation by noise level."""
    pictures: bool = False
    """Whether the distillation compares decoded pictures, as published, or samples as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = require_few_steps(self, self.sampler)
        require_shares(self, "shares", self.shares, sampler.steps)
        if self.judge.features in ("fake", "frozen_fake"):
            raise ValueError(
                "ADD has no fake score, so its judge reads pictures, the 'teacher' or a network "
                f"of its 'own'; got {self.judge.features!r}"
            )
        if self.distil < 0:
            raise ValueError(f"ADD.distil is 0 or more, got {self.distil:g}")

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and what judges."""
        return self.judge.equipped(Nets({"student": deepcopy(net)}), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the discriminator, then one of the student."""
        return (
            Turn("discriminator", self.judge_loss),
            Turn("student", self.student_loss),
        )

    def samples(self, nets: Nets, teacher: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's samples and the data they are made of, both (B, *)."""
        x0, draws = need_data(self, batch), need_draws(batch)
        sampler = require_few_steps(self, self.sampler)
        s = call_times(sampler, teacher.path, self.shares, draws, x0)
        student: Any = nets["student"]
        return student(call_input(sampler, teacher.path, x0, batch.z, s), s, batch.cond), x0

    def judge_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss; arguments, logs and errors as of `Discriminator.judge`."""
        with torch.no_grad():
            x, x0 = self.samples(nets, teacher, batch)
        pair = self.judge.pair(teacher.path, x, x0, batch)
        return self.judge.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, adversarial and distillation.

        Args:
            nets: the "student" and the "discriminator".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), z, cond and draws.

        Returns: the mean over the batch; logs "gan_loss" and "distillation".

        Raises ValueError where the batch has no data or draws, or where samples are no pictures.
        """
        x, _ = self.samples(nets, teacher, batch)
        apart = batch._replace(draws=need_draws(batch).under("distillation"))
        n = add_noise(teacher.path, x, self.times, apart)
        with torch.no_grad():
            p = teacher(n.xt.detach(), n.t, batch.cond)
            weight = self.weight(x, p, n.alpha, n.sigma)
        made, target = (pictures_of(teacher, one) for one in (x, p)) if self.pictures else (x, p)
        score = denoising(made, target, weight).mean()
        judged = self.judge.noised(teacher.path, x, batch)
        gan = self.judge.fool(nets, teacher, batch, judged, batch.cond)
        logs = {"gan_loss": gan.gan_loss, "distillation": score}
        return Loss(gan.total + self.distil * score, logs)
