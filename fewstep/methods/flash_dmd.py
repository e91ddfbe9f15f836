"""Flash-DMD (Chen et al. 2025), https://arxiv.org/abs/2511.20549.

DMD2 adds the gradients of two losses at every call of a student. Here a call has one of them: of
the K calls the first `matched`, at high noise, where the layout is decided, are brought to the
teacher's law, and the others, at low noise, learn texture from a discriminator and real data,

    k <= matched    (f_psi - f_phi) / mean |x - f_phi|    on x = x^(k)
    k > matched     gan L_GAN(x^(k))

A call is drawn for each step. The fake score learns by denoising the outputs of the first calls
alone, which are what it is compared at, and is kept near the student by some of its weights,

    psi <- keep psi + (1 - keep) theta    after each step,

so that one or two updates of it suffice for one of the student.

In a second stage the student is tuned by preferences between its own trajectories, at the calls at
high noise, while the distillation goes on and holds it: `share` steps of preferences to one of
distillation. The paper draws candidates from one state and has them judged by a reward model of
noisy latents; here two whole trajectories are judged by their pictures, as in PSO
(`fewstep.distillation.preferences`), against the student as it was when the stage began.

What the paper does not say in what was read, and is a choice here: which of four calls are matched
(two), `keep`, and the weight of the adversarial loss, which is the only one of its steps. The
published discriminator reads SAM's features of decoded pictures; the default reads the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore, Rollout, kl_direction
from fewstep.distillation.flow_maps import follow
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.distillation.preferences import Preference, require_likelihood
from fewstep.losses.weight import L1, EDMWeight, Weight


@dataclass(frozen=True)
class FlashDMD(Method):
    """Flash-DMD: by the call of the step, distribution matching or a GAN; later preferences too.

    It needs a teacher with encoder features (`fewstep.diffusion.encoder_features`), real data and
    a student of several calls. ValueError for values that do not fit one another, and where the
    fake score is another network than the student whose weights it is to take. Chen et al. 2025,
    https://arxiv.org/abs/2511.20549.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5, steps=4)
    matched: int = 2
    """Calls that are matched to the teacher, from the noisiest on; the others learn from data."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's score loss."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake: FakeScore = FakeScore(Karras(), EDMWeight())
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student; published: 1 or 2."""
    keep: float = 0.999
    """Share of its own weights that the fake score keeps in a step; 1: all of them."""
    judge: Discriminator = Discriminator()
    """What tells samples from data."""
    gan: float = 0.01
    """Weight of the adversarial loss, which is not published; at 1 it leads a student of a few
    hundred updates further from the data than it began."""
    preference: Preference | None = None
    """What the second stage prefers; None: there is none."""
    preferred_from: int = 1000
    """The first step of the second stage."""
    share: int = 5
    """Steps of preferences to one of distillation in the second stage."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.matched < self.sampler.calls:
            raise ValueError(
                "FlashDMD.matched is at least 1 and less than the calls of its sampler, got "
                f"{self.matched} of {self.sampler.calls}"
            )
        if not 0 <= self.keep <= 1 or not self.gan > 0:
            raise ValueError(
                f"FlashDMD needs keep from 0 to 1 and gan > 0, got {self.keep:g} and {self.gan:g}"
            )
        if self.judge.features == "fake":
            raise ValueError(
                "FlashDMD's fake score learns by denoising alone; its judge has features="
                "'teacher', 'frozen_fake', 'own', or pictures"
            )
        if self.preference is not None:
            require_likelihood(self, self.sampler)
            if self.preferred_from < 1 or self.share < 1:
                raise ValueError(
                    "FlashDMD.preferred_from and share are 1 or more, got "
                    f"{self.preferred_from} and {self.share}"
                )

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score, what judges, and the reference of a second stage."""
        nets = super().init(teacher, net)
        shapes = [[p.shape for p in nets[name].parameters()] for name in ("student", "fake")]
        if self.keep < 1 and shapes[0] != shapes[1]:
            raise ValueError(
                "FlashDMD mixes weights of the student into the fake score, but they are other "
                "networks; say keep=1.0"
            )
        nets = self.judge.equipped(nets, teacher)
        if self.preference is not None:
            nets["reference"] = deepcopy(nets["student"])
        return nets

    def call(self, step: int) -> int:
        """The call that a step trains, from 1: a function of the step."""
        return 1 + int(Draws(torch.tensor([step])).integers("rollout", self.sampler.calls))

    def high_call(self, step: int) -> int:
        """One of the matched calls, that of the step if it is one of them."""
        k = self.call(step)
        if k <= self.matched:
            return k
        return 1 + int(Draws(torch.tensor([step])).integers("matched", self.matched))

    def prefers(self, step: int) -> bool:
        """Whether a step is one of preferences: `share` in a row, then one of distillation."""
        later = step - self.preferred_from
        return self.preference is not None and later >= 0 and later % (self.share + 1) < self.share

    def turns(self, step: int) -> Sequence[Turn]:
        """Updates of what the step's call learns from, and one of the student."""
        high = self.high_call(step)
        if self.preference is not None and self.prefers(step):
            return (Turn("student", partial(self.preference.loss, self.sampler, high)),)
        fake = self.fake.turn(Rollout(self.sampler, high), self.guidance)
        rollout = Rollout(self.sampler, self.call(step))
        if rollout.k <= self.matched:
            return *self.fake_updates(fake), Turn("student", partial(self.matching_loss, rollout))
        student = Turn("student", partial(self.adversarial_loss, rollout))
        return *self.fake_updates(fake), self.judge.turn(rollout), student

    def after_step(self, step: Step) -> None:
        """The fake score takes weights of the student; the reference of a stage is what it was."""
        super().after_step(step)
        if self.keep < 1 and not self.prefers(step.step):
            follow(step, self.keep, "fake")
        if self.preference is not None and step.step + 1 == self.preferred_from:
            follow(step, 0.0, "reference")

    def matching_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss at high noise, the KL direction; no graph but the student's.

        Args:
            rollout: makes the student's samples x, (B, *), by one of the matched calls.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score", of which only the gradient has a meaning.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        return Loss(score, {"score": score})

    def adversarial_loss(
        self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The student's loss at low noise; arguments as of `matching_loss`, logs "gan_loss"."""
        x = rollout(nets, batch)
        apart = batch._replace(draws=need_draws(batch).under("gan"))
        n = self.judge.noised(teacher.path, x, apart)
        gan = self.judge.fool(nets, teacher, apart, n, batch.cond)
        return Loss(self.gan * gan.total, {"gan_loss": gan.gan_loss})
