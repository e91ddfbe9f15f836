"""DMDR (Jiang et al. 2025): distribution matching distillation with a reward,
https://arxiv.org/abs/2511.13649.

After a cold start by distribution matching alone, the same samples x are also rewarded,

    L = w (f_psi - f_real) on x  -  reward_weight E r(decode(x), c)    from step `cold` on,

with DMD's normaliser w; r is the log-probability that a frozen classifier gives the label. The
distillation is what holds the student: a reward alone has no optimum that anyone wants
(`fewstep.methods.rewarded`, which adds one to any method).

Two things change while the student is still far from its teacher, both with

    fade = (1 + cos(pi step / dynamic)) / 2,    from 1 at step 0 to 0 at step `dynamic`.

*Dynamic renoise*: flow times tau = sigma / (alpha + sigma) have the law Beta(a, b) with
(a, b) = 1 + fade (start - 1), from Beta(4, 1.5), which is high noise, to a uniform law. The fake
score learns at the same times.

*Dynamic distribution guidance*: the target begins near the student. The published teacher carries
the fake score's adapters at the scale s = fade * lead. Here predictions are mixed,
f_real = f_phi + s (f_psi - f_phi), which is the same to first order in the adapters and needs
none. Up to the normaliser the direction is then (1 - s) (f_psi - f_phi).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, predict
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.distillation.pictures import Reward, rewards_of
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, EDMWeight, Weight


@dataclass(frozen=True)
class FlowBeta(TimeLaw):
    """The times of `path` whose flow time sigma / (alpha + sigma) has the law Beta(a, b).

    Its quantiles are read off a table, to about 1e-6. ValueError for a or b below 1.
    """

    path: NoisePath
    """The noise path whose times these are."""
    a: float = 1.0
    """a of the law, 1 or more; larger values draw flow times to the noise."""
    b: float = 1.0
    """b of the law, 1 or more; larger values draw flow times to the data."""

    def __post_init__(self) -> None:
        if not min(self.a, self.b) >= 1:
            raise ValueError(f"FlowBeta needs a >= 1 and b >= 1, got {self.a:g} and {self.b:g}")

    def quantile(self, u: Tensor) -> Tensor:
        """The time of the flow time with the share u of all below it."""
        if self.a == 1 == self.b:
            return self.path.time_of(u)
        angle, share = (x.to(u.device) for x in self._table)
        at = torch.searchsorted(share, u.double().contiguous()).clamp(1, len(share) - 1)
        low, high = share[at - 1], share[at]
        part = ((u - low) / (high - low)).clamp(0, 1)
        theta = torch.lerp(angle[at - 1], angle[at], part)
        return self.path.time_of((theta.sin() ** 2).to(u))

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Angles theta with tau = sin^2 theta, and the shares below them, by midpoints."""
        angle = torch.linspace(0, math.pi / 2, 8193, dtype=torch.float64, device="cpu")
        density = angle.sin() ** (2 * self.a - 1) * angle.cos() ** (2 * self.b - 1)
        share = torch.cat([density[:1], density[1::2].cumsum(0)])
        return angle[::2], share / share[-1]


@dataclass(frozen=True)
class DMDR(Method):
    """DMDR: `ratio` updates of the fake score, then one of the student, later with a reward.

    Published for one step on ImageNet 256: a cold start of 20,000 steps, of which 10,000 are
    dynamic, five updates of the fake score, whose loss is that of a flow's velocity, and a weight
    of 0.05; the numbers of steps here suit small runs. It needs a teacher and a reward, and no
    data. Logs of the student: "score", and "reward" and "reward_std" once there is one.
    ValueError for values out of range. Jiang et al. 2025, https://arxiv.org/abs/2511.13649.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    reward: Reward = field(kw_only=True)
    """What is raised, such as `LabelReward`."""
    reward_weight: float = 0.05
    """Weight of the reward in the student's loss, whose score term is a mean over dimensions."""
    cold: int = 600
    """The first step with a reward; 20,000 as published."""
    dynamic: int = 300
    """Steps until times are uniform and the target is the teacher; 10,000 as published."""
    start: tuple[float, float] = (4.0, 1.5)
    """a and b of the law of flow times at step 0."""
    lead: float = 0.75
    """Share of the fake score in the target at step 0; 0: none."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_real|."""
    fake_weight: Weight = EDMWeight()
    """w of the fake score's loss; published: `Power(0, -2)`, that of a flow's velocity."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_weight > 0 or min(self.cold, self.dynamic) < 0:
            raise ValueError(
                "DMDR needs reward_weight > 0, and cold and dynamic of 0 or more; got "
                f"{self.reward_weight:g}, {self.cold} and {self.dynamic}"
            )
        if not 0 <= self.lead < 1 or min(self.start) < 1:
            raise ValueError(
                f"DMDR needs 0 <= lead < 1 and start of 1 or more twice, got {self.lead:g} and "
                f"{self.start}"
            )

    def noise_levels(self, path: NoisePath) -> TimeLaw:
        """The law that the times end at."""
        return FlowBeta(path)

    def fade(self, step: int) -> float:
        """What is left of the dynamic start at a step, from 1 to 0."""
        if step >= self.dynamic:
            return 0.0
        return (1 + math.cos(math.pi * step / self.dynamic)) / 2

    def law(self, fade: float, path: NoisePath) -> TimeLaw:
        """The times of both losses, where so much of the dynamic start is left."""
        a, b = (1 + fade * (end - 1) for end in self.start)
        return FlowBeta(path, a, b)

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout, fade = Rollout.at(step, self.sampler, self.matching), self.fade(step)
        fake = Turn("fake", partial(self.fake_loss, fade, rollout))
        student = partial(self.student_loss, fade, step >= self.cold, rollout)
        return *self.fake_updates(fake), Turn("student", student)

    def fake_loss(
        self, fade: float, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The fake score's loss on samples of the student, at the times of the step."""
        learn = FakeScore(self.law(fade, teacher.path), self.fake_weight)
        return learn.loss(rollout, self.guidance, nets, teacher, batch)

    def student_loss(
        self,
        fade: float,
        rewarded: bool,
        rollout: Rollout,
        nets: Nets,
        teacher: Denoiser,
        batch: Batch,
    ) -> Loss:
        """The student's loss, the KL direction and the reward of the same samples.

        Args:
            fade: what is left of the dynamic start.
            rewarded: whether the cold start is over.
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser, which may bring a decoder (`give_decoder`).
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs as of the class.

        Raises ValueError where the batch has no draws, guidance meets no conditions, or samples
        are no pictures.
        """
        x = rollout(nets, batch)
        with torch.no_grad():
            law = self.law(fade, teacher.path)
            p = predict(nets, teacher, batch, x, law, self.guidance)
            real = p.real + self.lead * fade * (p.fake - p.real)
            weight = self.weight(x, real, p.alpha, p.sigma)
        score = kl(x, real, p.fake, weight).mean()
        if not rewarded:
            return Loss(score, {"score": score})
        worth = rewards_of(self.reward, teacher, x, batch.cond)
        logs = {"reward": worth.mean(), "reward_std": worth.std(correction=0)}
        return Loss(score - self.reward_weight * worth.mean(), {"score": score, **logs})
