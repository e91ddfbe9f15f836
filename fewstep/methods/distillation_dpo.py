"""Distillation-DPO (Zhao et al. 2025), https://arxiv.org/abs/2504.11447.

Two samples x are drawn for the same condition, and a reward, which need not be differentiable,
says which one wins. Each side has a fake score of its own, f_w of the samples that win and f_l of
those that lose, and the student is pushed by the differences to the teacher,

    winners E <w (f_w - f_phi)(x_t), x>_win + losers E <w (f_l - f_phi)(x_t), x>_lose,

both factors without a gradient, with the published signs winners = 1 and losers = -1: the law of
what wins is pulled to the teacher's, that of what loses is pushed away from it. This is the
gradient of winners KL(p_win || q) + losers KL(p_lose || q), which samples are on which side held.

The released code multiplies the differences by x_t - x in place of x. The sample cancels there, so
that its gradient is zero whatever the networks are; what is here is what the paper means.

Where it leads can be said exactly for a student a + b z, a teacher N(mu, V) and a reward that
rises with x. With m = b / pi^(1/2), the mean of the larger of two standard normals times b, and
the exact weight alpha^2 / sigma^2 on the path alpha = 1, the gradient in a is

    (winners (a + m - mu) + losers (a - m - mu)) / (V + t^2).

With the published signs it is 2 m / (V + t^2) for every a: the mean is pushed against the reward
and never held. With 0 <= winners < losers it rests where the reward is higher than the teacher's,

    a = mu + m (losers - winners) / (losers + winners),

since what must not lose is what is taught. Take these, and look at the reward that is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import expand
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, predict
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pictures import Reward, rewards_of
from fewstep.losses.score import kl
from fewstep.losses.weight import Power, Weight

SIDES = {"fake": 0, "fake_losers": 1}
"""The fake score of each side."""


class Sides(NamedTuple):
    """Pairs of samples by who wins: (B, *) twice, and their mean reward."""

    winners: Tensor
    losers: Tensor
    reward: Tensor


@dataclass(frozen=True)
class DistillationDPO(Method):
    """Distillation-DPO: an update of each side's fake score, then one of the student.

    It needs a teacher and a reward, and no data. With the default factors, the published ones,
    the student is pushed against the reward (see the module's text); `winners=0.0, losers=1.0`
    raises it. Logs of the student: "reward", the mean of both sides. ValueError for factors that
    are both zero. Zhao et al. 2025, https://arxiv.org/abs/2504.11447.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    reward: Reward = field(kw_only=True)
    """Which of two pictures wins; its gradient is not used."""
    winners: float = 1.0
    """Factor of the direction on samples that win."""
    losers: float = -1.0
    """Factor of the direction on samples that lose."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's score loss."""
    weight: Weight = Power(1, -1)
    """w of the directions; alpha / sigma makes them differences of predicted noise."""
    scale: float | None = None
    """The second sample's noise over the first's, 1.1 in the released code; None: its own."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.winners == 0 == self.losers:
            raise ValueError("DistillationDPO.winners and losers are not both 0")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and the fake scores of what wins ("fake") and loses ("fake_losers")."""
        nets = super().init(teacher, net)
        nets["fake_losers"] = deepcopy(nets["fake"])
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of each fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fakes = [Turn(name, partial(self.fake_loss, name, rollout)) for name in SIDES]
        return *fakes, Turn("student", partial(self.student_loss, rollout))

    def drawn(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Sides:
        """Two samples for each condition, with a gradient, by who wins; of equals the first."""
        draws = need_draws(batch).under("other")
        if self.scale is None:
            z = draws.normal("z", batch.z.shape[1:]).to(batch.z)
        else:
            z = self.scale * batch.z
        first, second = (rollout(nets, one) for one in (batch, batch._replace(z=z, draws=draws)))
        with torch.no_grad():
            worth = [rewards_of(self.reward, teacher, x, batch.cond) for x in (first, second)]
            ahead = expand(worth[0] >= worth[1], first)
        winners = torch.where(ahead, first, second)
        return Sides(winners, torch.where(ahead, second, first), torch.cat(worth).mean())

    def fake_loss(
        self, name: str, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The denoising loss of one side's fake score on the samples of that side."""

        def side(nets: Nets, batch: Batch) -> Tensor:
            return self.drawn(rollout, nets, teacher, batch)[SIDES[name]]

        return self.fake.loss(side, self.guidance, of_side(nets, name), teacher, batch)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL directions of both sides; no graph but the student's.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the fake scores.
            teacher: the teacher's denoiser, which may bring a decoder (`give_decoder`).
            batch: z (B, *), cond and draws; the second samples have draws of their own.

        Returns: the mean over the batch, of which only the gradient has a meaning; logs "reward".

        Raises ValueError where the batch has no draws, guidance meets no conditions, or samples
        are no pictures.
        """
        pair = self.drawn(rollout, nets, teacher, batch)
        total = batch.z.new_zeros(())
        for name, factor in zip(SIDES, (self.winners, self.losers), strict=True):
            x = pair[SIDES[name]]
            with torch.no_grad():
                own = of_side(nets, name)
                p = predict(own, teacher, batch, x, self.times, self.guidance)
                weight = self.weight(x, p.real, p.alpha, p.sigma)
            total = total + factor * kl(x, p.real, p.fake, weight).mean()
        return Loss(total, {"reward": pair.reward})


def of_side(nets: Nets, name: str) -> Nets:
    """The student, and the fake score of one side as "fake"."""
    return Nets({"student": nets["student"], "fake": nets[name]})
