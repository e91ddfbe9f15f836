"""Diffusion2GAN (Kang et al. 2024), https://arxiv.org/abs/2405.05967.

Distillation as paired translation of pictures. A deterministic teacher sends noise z under a
condition c to a sample y; of many such pairs, made once, a conditional GAN with a perceptual
regression learns the map in one call:

    L_G = d(G(z, c), y)  +  gan E softplus(-l(G(z, c), z, c)),
    L_D = E softplus(-l(y, z, c))  +  (1 - m) E softplus(l(G(z, c), z, c))
                                   +  m E softplus(l(y, z', c'))  +  r1 / 2 |grad_y l|^2,

L_D halved here. d is measured in the features of a network, from random views of both
(`fewstep.distillation.feature_distance`): with squared errors alone the published FID is five
times as large. The discriminator starts as the network that is distilled, judges samples without
noise, and hears z as the state sigma z of the first call; R1 is of every 16th update, and there 16
times as large. A share m of what it calls generated are samples y that belong to other noise and
another condition, so that it minds both. That moves the minimum: where real and generated laws are
equal, the student is still pushed to agree with its condition more than data do.

`gan`, m and r1 are guesses, as the body of the paper could not be read here. Left out are
E-LatentLPIPS itself (a classifier of Stable Diffusion's latents), the inputs and
outputs of the discriminator at several scales, and R1 on one sample of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.call_inputs import first_state, require_few_steps
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.feature_distance import AnyDistance, FeatureDistance, sample_distance
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pairs import Pair, Pairs, pair_of
from fewstep.losses.adversarial import GradientPenalty


@dataclass(frozen=True)
class Diffusion2GAN(Method):
    """Diffusion2GAN: one update of the discriminator, then one of a student of one call.

    It needs a teacher, whose samples are made first, and no data; a teacher with encoder features
    (`fewstep.diffusion.encoder_features`), or a distance that reads none. ValueError for another
    number of calls, for a discriminator that reads a fake score, and for values out of range. Kang
    et al. 2024, https://arxiv.org/abs/2405.05967.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    pairs: Pairs = Pairs()
    """The teacher's samples y and their noise z."""
    distance: AnyDistance = FeatureDistance()
    """d: in the teacher's features, in those of pictures, or of the samples themselves."""
    judge: Discriminator = Discriminator(
        None, "own", penalty=GradientPenalty(0.01), joint=True, mismatch=0.2
    )
    """What tells real from generated; m is its `mismatch`."""
    gan: float = 0.1
    """Weight of the student's adversarial loss."""
    every: int = 16
    """Updates of the discriminator to one with gradient penalties, which are as many times
    larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if require_few_steps(self, self.sampler).calls != 1:
            raise ValueError(
                f"Diffusion2GAN.sampler is a FewStep of one call, as pairs are its data; got "
                f"{self.sampler.calls} calls"
            )
        if self.judge.features == "fake" or self.gan < 0 or self.every < 1:
            raise ValueError(
                "Diffusion2GAN has no fake score to judge by, and needs gan >= 0 and every >= 1; "
                f"got {self.judge.features!r}, {self.gan:g} and {self.every}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def noise_levels(self, path: NoisePath) -> TimeLaw | None:
        """Those of the judge, if it has any."""
        return self.judge.times

    def needs_pairs(self) -> Pairs:
        """The pairs."""
        return self.pairs

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and what judges."""
        return self.judge.equipped(Nets({"student": deepcopy(net)}), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the discriminator, with penalties now and then, and one of the student."""
        lazy = self.judge.penalty
        size = 0.0 if step % self.every else float(self.every)
        penalty = replace(lazy, r1=size * lazy.r1, r2=size * lazy.r2)
        judge = replace(self.judge, penalty=penalty)
        return (
            Turn("discriminator", partial(self.judge_loss, judge)),
            Turn("student", self.student_loss),
        )

    def made(self, nets: Nets, batch: Batch) -> tuple[Tensor, Pair, Batch]:
        """G(z, c), the pairs, and a batch of theirs."""
        pair = pair_of(self, batch)
        own = batch._replace(z=pair.z, cond=pair.cond, x0=pair.x0)
        return Rollout(self.sampler, 1)(nets, own), pair, own

    def judge_loss(
        self, judge: Discriminator, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The discriminator's loss; errors and logs as of `Discriminator.judge`."""
        with torch.no_grad():
            x, pair, own = self.made(nets, batch)
        states = (first_state(self.sampler, teacher.path, z) for z in (pair.z, batch.z))
        beside, other = states if judge.joint else (None, None)
        both = judge.pair(teacher.path, x, pair.x0, own)._replace(beside=beside)
        more = {"other": batch.cond, "other_state": other} if judge.mismatch else {}
        return judge.judge(nets, teacher, own, both, pair.cond, **more)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, regression and adversarial term.

        Args:
            nets: the "student" and the "discriminator".
            teacher: the teacher's denoiser, for its features.
            batch: its pairs (`pair_of`) and draws.

        Returns: the mean over the batch; logs "regression" and "gan_loss".

        Raises ValueError where the batch has no pairs or draws.
        """
        x, pair, own = self.made(nets, batch)
        apart = sample_distance(self.distance, teacher, x, pair.x0, own, pair.cond).mean()
        n = self.judge.noised(teacher.path, x, own)
        beside = first_state(self.sampler, teacher.path, pair.z) if self.judge.joint else None
        gan = self.judge.fool(nets, teacher, own, n, pair.cond, beside=beside)
        logs = {"regression": apart, "gan_loss": gan.gan_loss}
        return Loss(apart + self.gan * gan.total, logs)
