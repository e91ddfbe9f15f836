"""The critic: a fake score, and the discriminator that learns beside it.

Zhou et al. 2024 (SiDA), https://arxiv.org/abs/2410.14919: the logits of real against fake are
read off the fake score's encoder, without new parameters, and one update serves both tasks:

    L_psi = E w |f_psi(x_t) - x|^2  +  (scale / D) E w_D BCE(encoder(x_t), encoder(x_t^real)),

D the number of pixels: the published weight is against the *sum* of squares over pixels. Real and
fake samples share the time, the noise and the condition. With `pool="learned"` a small head on the
encoder makes the logits, as in DMD2 (`fewstep.distillation.discriminator_head`).

All that is said of the discriminator is a `fewstep.distillation.discriminator.Discriminator`
(`Critic.discriminator`). One that reads other features than the fake score's is a network of its
own, and has an update of its own after that of the fake score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser
from fewstep.distillation.augment import Augment
from fewstep.distillation.discriminator import Discriminator, Features
from fewstep.distillation.fake_score import FakeScore, Rollout, log_variance, paced
from fewstep.distillation.guidance_scales import Guidance
from fewstep.distillation.method import Loss, Nets, Turn, need_data
from fewstep.losses.adversarial import Adversarial, Average, GradientPenalty, Pool
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Weight


@dataclass(frozen=True)
class Critic:
    """How nets["fake"] learns to denoise and to discriminate; the defaults are SiDA's.

    Attributes:
        times: the distribution of the noise levels of both losses.
        weight: w, the weight of the denoising loss by noise level.
        judging: w_D, the weight of the discriminator's loss by noise level.
        scale: weight of the discriminator against the denoising summed over pixels, where the fake
            score learns both at once; a discriminator with an update of its own needs none.
        average, pool, augment, features, layers, loss, penalty: as for `Discriminator`.
        logvar: as for `FakeScore`; the discriminator's loss is divided by e^u too, where the fake
            score learns both at once.

    Raises ValueError where scale is negative, and as `Discriminator` does. Zhou et al. 2024,
    https://arxiv.org/abs/2410.14919.
    """

    times: TimeLaw = LogNormal()
    """Noise levels of both losses."""
    weight: Weight = EDMWeight()
    """w of the denoising."""
    judging: Weight = EDMWeight()
    """w_D of the discriminator."""
    scale: float = 1.0
    """Weight of the discriminator against the denoising summed over pixels."""
    average: Average = "batch"
    """Whether w multiplies the adversarial loss of the whole "batch", or of each "sample"."""
    pool: Pool = "channels"
    """How features make logits: their mean over "channels" or "space", or a "learned" head."""
    augment: Augment | None = None
    """How real and generated samples are moved first, each by itself."""
    logvar: bool = False
    """As for `FakeScore`; the discriminator's loss is divided by e^u too."""
    features: Features = "fake"
    """What the discriminator reads: the "fake" score, the "teacher", or a network of its "own"."""
    layers: tuple[str, ...] = ()
    """Modules of the teacher that it reads, by name; none: the teacher's encoder."""
    loss: Adversarial = "nonsaturating"
    """The adversarial loss, of both sides."""
    penalty: GradientPenalty = GradientPenalty()
    """R1 and R2 of the discriminator."""

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"Critic.scale is 0 or more, got {self.scale:g}")
        _ = self.discriminator  # refuses what does not fit

    @property
    def discriminator(self) -> Discriminator:
        """What tells real samples from generated ones, for both sides."""
        read = self.times, self.features, self.layers, self.pool
        return Discriminator(
            *read, self.loss, self.penalty, self.judging, self.average, self.augment
        )

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a sample is weighted by the mean over the batch."""
        return self.discriminator.couples_samples

    def equipped(self, nets: Nets, teacher: Denoiser | None = None) -> Nets:
        """`nets` with what judges, as `Discriminator.equipped`."""
        return self.discriminator.equipped(nets, teacher)

    def turns(self, rollout: Rollout, guidance: Guidance) -> Sequence[Turn]:
        """The update of the fake score, then that of a discriminator with a network of its own."""
        judge = self.discriminator
        own = () if judge.net == "fake" else (judge.turn(rollout),)
        return self.turn(rollout, guidance), *own

    def turn(self, rollout: Rollout, guidance: Guidance) -> Turn:
        """The update of nets["fake"] on samples of a rollout, and on real data if it judges."""
        if self.features != "fake":
            score = FakeScore(self.times, self.weight, self.augment, self.logvar)
            return score.turn(rollout, guidance)
        return Turn("fake", partial(self._both, rollout, guidance))

    def _both(
        self, rollout: Rollout, guidance: Guidance, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The denoising loss of the generated samples and the discriminator's loss.

        It takes one full pass over the generated samples and the encoder alone over the real ones,
        which get the same times and noise. Logs "denoising" and what the discriminator logs.
        ValueError where the batch has no data.
        """
        judge, x0 = self.discriminator, need_data(self, batch)
        with torch.no_grad():
            pair = judge.pair(teacher.path, rollout(nets, batch), x0, batch)
        x, fake = pair.x, pair.fake
        kappa = guidance.learning(batch)
        (prediction,), features = guided(
            nets["fake"], fake.xt, fake.t, batch.cond, [kappa], True, pair.fake_labels
        )
        assert features is not None
        u = log_variance(nets, fake, self.logvar)
        weight = self.weight(x, x, fake.alpha, fake.sigma) * (-u).exp()
        denoised = denoising(prediction, x, weight).mean() + u.mean()
        cond, on_fake = judge.condition(batch, kappa), judge.pooled(features)
        judged = judge.judge(nets, teacher, batch, pair, cond, on_fake, (-u).exp())
        assert judged.total is not None
        total = denoised + self.scale / x0[0].numel() * judged.total
        loss = Loss(total, {"denoising": denoised, **judged.logs})
        learnt = prediction, x, weight
        return paced(
            loss, nets, teacher, batch, fake, learnt, guidance, more=tuple(pair.fake_labels)
        )
