"""The critic: a fake score that is its own discriminator.

Zhou et al. 2024 (SiDA), https://arxiv.org/abs/2410.14919: the logits of real against fake are
read off the fake score's encoder, without new parameters, and one update serves both tasks:

    L_psi = E w |f_psi(x_t) - x|^2  +  (scale / D) E w_D BCE(encoder(x_t), encoder(x_t^real)),

D the number of pixels: the published weight is against the *sum* of squares over pixels. Real and
fake samples share the time, the noise and the condition. With `pool="learned"` a small head on the
encoder makes the logits, as in DMD2 (`fewstep.distillation.discriminator_head`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from fewstep.diffusion.encoder_features import require_encoder_features
from fewstep.diffusion.guidance import guided, is_zero
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser
from fewstep.distillation.augment import Augment
from fewstep.distillation.discriminator_head import DenoiserWithHead
from fewstep.distillation.fake_score import Rollout, add_noise, augment_samples, log_variance
from fewstep.distillation.guidance_scales import Guidance
from fewstep.distillation.method import Loss, Nets, Turn, need_data
from fewstep.losses.adversarial import Average, Pool, averaged, discriminator, logits
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Weight


@dataclass(frozen=True)
class Critic:
    """How nets["fake"] learns to denoise and to discriminate; the defaults are SiDA's.

    Fields:
        times: the distribution of the noise levels of both losses.
        weight: w of the denoising loss.
        judging: w_D of the discriminator's loss.
        scale: weight of the discriminator against the denoising summed over pixels.
        average: whether w_D multiplies the loss of the whole "batch", or of each "sample".
        pool: how features make logits: their mean over "channels" or "space", or a "learned" head.
        augment: how real and generated samples are moved first, each by itself.
        logvar: as for `FakeScore`; the discriminator's loss is divided by e^u too.

    Raises ValueError where scale is negative. Zhou et al. 2024, https://arxiv.org/abs/2410.14919.
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

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"Critic.scale is 0 or more, got {self.scale:g}")

    def equipped(self, nets: Nets) -> Nets:
        """`nets`, with a learned head on the fake score where `pool` is "learned".

        For a method's init; changes `nets` in place.
        """
        if self.pool == "learned":
            nets["fake"] = DenoiserWithHead(nets["fake"])
        return nets

    def turn(self, rollout: Rollout, guidance: Guidance) -> Turn:
        """The update of the critic on samples of a rollout and real data."""
        return Turn("fake", partial(self.loss, rollout, guidance))

    def loss(
        self, rollout: Rollout, guidance: Guidance, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The denoising loss of the generated samples and the discriminator's loss.

        It takes one full pass over the generated samples and the encoder alone over the real ones,
        which get the same times and noise. Logs "denoising", "discriminator" and
        "discriminator_accuracy". ValueError where the batch has no data.
        """
        x0, net = need_data(self, batch), nets["fake"]
        with torch.no_grad():
            x, fake_labels = augment_samples(self.augment, rollout(nets, batch), batch)
            x0, real_labels = augment_samples(self.augment, x0, batch, "augment/real")
        fake = add_noise(teacher.path, x, self.times, batch)
        real = add_noise(teacher.path, x0, self.times, batch)  # the same times and noise
        kappa = guidance.learning(batch)
        (prediction,), features = guided(
            net, fake.xt, fake.t, batch.cond, [kappa], True, fake_labels
        )
        assert features is not None
        u = log_variance(nets, fake, self.logvar)
        weight = self.weight(x, x, fake.alpha, fake.sigma) * (-u).exp()
        denoised = denoising(prediction, x, weight).mean() + u.mean()
        cond = None if is_zero(kappa) else batch.cond
        on_real = logits(
            require_encoder_features(net).encode(real.xt, real.t, cond, *real_labels), self.pool
        )
        on_fake = logits(features, self.pool)
        judging = self.judging(x, x, fake.alpha, fake.sigma) * (-u).exp()
        judged = averaged(discriminator(on_real, on_fake), judging, self.average).mean()
        accuracy = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        logs = {"denoising": denoised, "discriminator": judged, "discriminator_accuracy": accuracy}
        return Loss(denoised + self.scale / x[0].numel() * judged, logs)
