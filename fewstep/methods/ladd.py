"""Latent adversarial diffusion distillation (Sauer et al. 2024), https://arxiv.org/abs/2403.12015.

A GAN and nothing else. The discriminator is the frozen teacher with small heads on its features,
so that it judges where the teacher denoises, at any noise level and without a decoder; the real
side is not data but samples x_0 of the teacher, made once, with guidance if one wants it in the
student. The student denoises them where its sampler calls it, at one of the times t_k,

    x = G(x_{t_k}, t_k),    x_{t_1} = sigma_{t_1} z,

and both are judged with noise of one level t and one noise eps:

    L_D = E h(l(x_0,t)) + h(-l(x_t)),    L_G = -E l(x_t),    l = head(teacher's features at x_t),

h(l) = relu(1 - l), over two, or another loss of `Discriminator`. The law of t says what the
student learns from: high levels the structure, low ones the detail. Published for rectified flow
is logit t ~ N(1, 1), which in EDM's units is ln sigma ~ N(1, 1).

Such levels suit large latents, whose neighbours say the same again and are seen through more
noise. On 8x8 pixels they hide all but the mean: the heads stay near chance, and a student that is
led by them at the full rate ends further from the data than it began. So by default levels are
lower, the loss is the non-saturating one, whose gradient fades where a student is taken for real,
and the student's rate is a tenth of the heads' (`rate`). As published:

    LADD(judge=Discriminator(LogNormal(1.0, 1.0), loss="hinge"), rate=1.0)

and on a flow path `Discriminator(LogitNormal(1.0, 1.0), ...)`.

Four calls are at t = 1, 3/4, 1/2, 1/4, drawn first with shares 0, 0, 1/2, 1/2, and after 500 steps
with 0.7, 0.1, 0.1, 0.1: `early_shares`, `early` and `shares` (these and the law of t are known
here from others' accounts of the paper). The published heads stand after every attention block,
whose names in the teacher `judge.layers` are, and hear the time and the prompt besides; those here
hear of both through the teacher's features alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.call_inputs import (
    call_input,
    call_times,
    require_few_steps,
    require_shares,
)
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pairs import Pairs, pair_of

Shares = tuple[float, ...]


@dataclass(frozen=True)
class LADD(Method):
    """LADD: one update of the discriminator's heads, then one of the student.

    It needs a teacher with encoder features (`fewstep.diffusion.encoder_features`), whose samples
    are made first, and no data. ValueError for another sampler than `FewStep`, for a discriminator
    that reads a fake score, and for shares that do not add up. Sauer et al. 2024,
    https://arxiv.org/abs/2403.12015.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    pairs: Pairs = Pairs()
    """The teacher's samples, which are the real ones."""
    judge: Discriminator = Discriminator(LogNormal(-0.3, 1.2))
    """What tells the teacher's samples from the student's, at which noise levels."""
    shares: Shares = ()
    """How often each of the student's calls is trained, the noisiest first; (): all alike."""
    early_shares: Shares = ()
    """The same shares before training step `early`."""
    early: int = 0
    """The first training step with `shares`."""
    rate: float = 0.1
    """The student's learning rate over the discriminator's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate <= 0:
            raise ValueError(f"LADD.rate is above 0, got {self.rate:g}")
        sampler = require_few_steps(self, self.sampler)
        require_shares(self, "shares", self.shares, sampler.steps)
        require_shares(self, "early_shares", self.early_shares, sampler.steps)
        if self.judge.features == "fake" or self.early < 0:
            raise ValueError(
                "LADD has no fake score, so its judge reads the 'teacher' or a network of its "
                f"'own', and early is 0 or more; got {self.judge.features!r} and {self.early}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def noise_levels(self, path: NoisePath) -> TimeLaw | None:
        """Those of the judge."""
        return self.judge.times

    def needs_pairs(self) -> Pairs:
        """The teacher's samples."""
        return self.pairs

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and what judges."""
        return self.judge.equipped(Nets({"student": deepcopy(net)}), teacher)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the discriminator, then one of the student."""
        shares = self.early_shares if step < self.early else self.shares
        return (
            Turn("discriminator", partial(self.judge_loss, shares)),
            Turn("student", partial(self.student_loss, shares), self.rate),
        )

    def samples(
        self, shares: Shares, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> tuple[Tensor, Batch]:
        """The student's samples x (B, *), and the batch with the teacher's as its data."""
        pair, sampler = pair_of(self, batch), require_few_steps(self, self.sampler)
        t = call_times(sampler, teacher.path, shares, need_draws(batch), pair.x0)
        xt = call_input(sampler, teacher.path, pair.x0, batch.z, t)
        student: Any = nets["student"]
        return student(xt, t, pair.cond), batch._replace(x0=pair.x0, cond=pair.cond)

    def judge_loss(self, shares: Shares, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss; arguments, logs and errors as of `Discriminator.judge`."""
        with torch.no_grad():
            x, batch = self.samples(shares, nets, teacher, batch)
            assert batch.x0 is not None
            pair = self.judge.pair(teacher.path, x, batch.x0, batch)
        return self.judge.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(self, shares: Shares, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's adversarial loss, with a gradient through what judges.

        Args:
            shares: of the student's calls.
            nets: the "student" and the "discriminator".
            teacher: the teacher's denoiser, whose features are read.
            batch: its z (B, *), draws and pairs (`pair_of`).

        Returns: the mean over the batch; logs "gan_loss", the same.

        Raises ValueError where the batch has no pairs or draws.
        """
        x, batch = self.samples(shares, nets, teacher, batch)
        n = self.judge.noised(teacher.path, x, batch)
        gan = self.judge.fool(nets, teacher, batch, n, batch.cond)
        return Loss(gan.total, {"gan_loss": gan.gan_loss})
