"""Trajectory distribution matching (Luo et al. 2025), https://arxiv.org/abs/2503.06674.

A student of K deterministic calls at t_1 > ... > t_K should pass through the laws that its teacher
passes through. Call k makes a prediction x and leads to the boundary state

    x_s = alpha_s x + sigma_s eps(x_t, x),    s = t_(k+1), and s = 0 after the last,

which is what is matched, and not x: x_s is noised on to a level between s and t_k, where teacher
and fake score are compared,

    x_t = (alpha_t / alpha_s) x_s + tau eps    (`fewstep.distillation.boundary`),

and x is pushed along (f_psi - f_phi) / mean |x - f_phi|. x_s moves with x by a positive factor, so
the direction is kept. As the levels of one call end where those of the next begin, one fake score
knows from t which call it looks at.

What the student converges to is decided by the target of the fake score. The noise in x_s is the
student's own, and not independent of x: with "sample", x itself, the default as released, f_psi is
not quite the score of x_t, and a Gaussian student ends with x_s a bit too wide. "subinterval" is
the score, whose fixed point is the teacher's law at s, but learns from far noisier targets, and
stays far behind within a thousand updates on digits. After the last call both are one.

The fake score is updated first, then the student. With `huber` = c the vector is
d / (d^2 + c^2)^(1/2) in each number of d = f_psi - f_phi, nearly its sign for the published 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.boundary import Renoised, renoise
from fewstep.distillation.call_inputs import require_trajectory
from fewstep.distillation.fake_score import Matching, Rollout, paced, predict_at
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.score import denoising, kl
from fewstep.losses.weight import L1, EDMWeight, Weight


@dataclass(frozen=True)
class TDM(Method):
    """Trajectory distribution matching: `ratio` updates of the fake score, one of the student.

    The defaults are four calls, one update each; the paper's guidance is `Kappas(real=4.5)` on
    PixArt. It needs a teacher and no data. ValueError for a sampler that is not deterministic, and
    for values out of range. Luo et al. 2025, https://arxiv.org/abs/2503.06674.
    """

    sampler: Sampler = FewStep(t_init=2.5, steps=4, noise="ddim")
    """A `FewStep` with noise "ddim", whose states are the trajectory."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of both losses, cut to those between s and t_k."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    huber: float = 0.0
    """c that bounds the direction (published: 1e-3); 0: the direction itself."""
    target: Literal["sample", "subinterval"] = "sample"
    """What the fake score learns: the prediction x (as released), or the score of x_t."""
    fake_weight: Weight = EDMWeight()
    """w of the fake score's loss (published: the SNR, at most 5)."""
    fake_rate: float = 1.0
    """Learning rate of the fake score over the student's (published: 5)."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which states are matched: of each call in turn, or of the "final" one alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_trajectory(self, self.sampler)
        if self.huber < 0 or self.fake_rate <= 0:
            raise ValueError(
                "TDM needs huber >= 0 and fake_rate > 0, got "
                f"{self.huber:g} and {self.fake_rate:g}"
            )

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student, on states of one call."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = Turn("fake", partial(self.fake_loss, rollout), self.fake_rate)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def fake_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The fake score's loss at noised states of the student, which carry no gradient."""
        with torch.no_grad():
            state = rollout.state(nets, batch)
            n, share, target = self.noised(rollout, state, batch)
        kappas = [self.guidance.learning(batch)]
        prediction = guided(nets["fake"], n.xt, n.t, batch.cond, kappas).predictions[0]
        weight = self.fake_weight(state.x0, state.x0, n.alpha, n.sigma)
        if self.target == "sample":
            share, target = torch.ones_like(share), state.x0
        learnt = share * prediction, target, weight
        loss = Loss(denoising(*learnt).mean())
        return paced(loss, nets, teacher, batch, n, learnt, self.guidance, share)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL direction at noised states; no graph but the student's.

        Args:
            rollout: makes the student's states.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning; nothing
        further is logged.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        state = rollout.state(nets, batch)
        with torch.no_grad():
            n = self.noised(rollout, state, batch).noised
            p = predict_at(nets, teacher, batch, n, self.guidance)
            weight = self.weight(state.x0, p.real, p.alpha, p.sigma)
            if self.huber:
                weight = weight / ((p.fake - p.real) ** 2 + self.huber**2).sqrt()
        return Loss(kl(state.x0, p.real, p.fake, weight).mean())

    def noised(self, rollout: Rollout, state: State, batch: Batch) -> Renoised:
        """The state x_s at a level between s and the time of its call."""
        draws, x = need_draws(batch), state.xs.detach()
        low = state.s.clamp(min=state.path.t_min)
        t = self.times.within(draws.uniform("t").to(state.t), low, state.t).to(x)
        eps = draws.normal("eps", x.shape[1:]).to(x)
        last = rollout.k == self.sampler.calls
        return renoise(state.path, x, eps, None if last else state.s, t)
