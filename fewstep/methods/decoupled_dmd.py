"""Decoupled DMD (Liu et al. 2025), https://arxiv.org/abs/2511.22677.

A student of DMD that learns from a guided teacher follows a vector which is a sum of two, since
guidance is affine, f_phi,w = f_phi,0 + w (f_phi,c - f_phi,0):

    f_psi - f_phi,w  =  (f_psi - f_phi,c)  +  (w - 1) (f_phi,0 - f_phi,c)
                        matching               augmentation

Matching is the gradient of KL(student || teacher) given the condition. Augmentation knows nothing
of the student's law: it is the gradient of -(w - 1) E log q_t(c | x_t), a reward for samples that
show their condition. It is what drives a student of few calls; matching keeps it from running
away, and neither is good alone. So each has noise levels, noise and a normaliser of its own:

    matching        all levels, since artefacts are found at any of them
    augmentation    levels below the call's own, tau < t_k: what is above has been settled by the
                    calls before, and would only be saturated further

both divided by mean |x - f_phi,c| at their own x_t and added with weight 1. The fake score is not
guided, learns at all levels, and is updated `ratio` times for each update of the student. Both
directions are logged by their size; a student whose `spread`, the mean variance over the numbers
of a sample, rises without end is one that augmentation has taken over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, augmentation, predict
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, EDMWeight, Weight


@dataclass(frozen=True)
class DecoupledDMD(Method):
    """DMD in two terms: `ratio` updates of the fake score, then one of the student.

    It needs a teacher and no data; with kappa other than 1 a teacher that knows conditions and
    has learned to do without. ValueError where ratio is below 1. Liu et al. 2025,
    https://arxiv.org/abs/2511.22677.
    """

    sampler: Sampler = FewStep(t_init=2.5, steps=4)
    kappa: float = 1.0
    """Guidance scale w of the teacher, part of the result; 1 leaves augmentation out (published:
    the teacher's own scale at sampling)."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the matching: 20 to 980 of a thousand."""
    weight: Weight = L1()
    """w, the weight of the matching by noise level."""
    augmentation_times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the augmentation, of which those below the call's own are taken."""
    augmentation_weight: Weight = L1()
    """w, the weight of the augmentation by noise level."""
    fake: FakeScore = FakeScore(Karras(), EDMWeight())
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, matching and augmentation on the same samples.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "matching" and "augmentation", the mean absolute
        directions, and "spread".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        state = rollout.state(nets, batch)
        x = state.x0
        with torch.no_grad():
            p = predict(nets, teacher, batch, x, self.times)
            weight = self.weight(x, p.real, p.alpha, p.sigma)
            law, scaled = self.augmentation_times, self.augmentation_weight
            reward = augmentation(x, state.t, self.kappa, law, scaled, teacher, batch)
        matching = kl(x, p.real, p.fake, weight).mean()
        pushed = kl(x, torch.zeros_like(x), reward).mean()
        with torch.no_grad():
            logs = {
                "matching": (weight * (p.fake - p.real)).abs().mean(),
                "augmentation": reward.abs().mean(),
                "spread": x.flatten(1).var(1, correction=0).mean(),
            }
        return Loss(matching + pushed, logs)
