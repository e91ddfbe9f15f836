"""The adversarial losses, on logits l of "real": l > 0 says real.

    discriminator    (softplus(-l_real) + softplus(l_fake)) / 2      binary cross-entropy
    generator        softplus(-clamp(l_fake, -10, 10))               non-saturating

(Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661). A discriminator may answer with a map
of logits; a sample's loss is the mean over its own map. SiDA (Zhou et al. 2024,
https://arxiv.org/abs/2410.14919) then replaces each sample's loss by the mean over the batch: the
weight of sample i no longer multiplies the loss of sample i (`average="batch"`). As the product
of two means this depends on what "the batch" is: split over accumulation parts or processes it is
another loss. `average="sample"` is free of that.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape
from fewstep.losses.score import mean_flat

Average = Literal["batch", "sample"]
Pool = Literal["channels", "space", "learned"]


def logits(features: Tensor, pool: Pool = "channels") -> Tensor:
    """Encoder features (B, F, *) -> logits (B, N), at least float32.

    Args:
        features: (B, F, *), channels first.
        pool: "channels", the mean over channels, one logit a place (SiDA, no new parameters);
            "space", the mean over places, one logit a channel (for tokens that a layer norm leaves
            without a mean over channels); "learned", where a head has made features of one
            channel, the logit itself (`fewstep.distillation.discriminator_head`).

    Returns: (B, N), positive for real.

    Raises ValueError for another `pool`, and for "learned" with more than one channel.
    """
    if pool not in ("channels", "space", "learned"):
        raise ValueError(f"pool is 'channels', 'space' or 'learned', got {pool!r}")
    if pool == "learned" and features.shape[1] != 1:
        raise ValueError(
            f"a learned head leaves one channel, got {features.shape[1]}: the fake score has "
            "none; a method's init gives it one with Critic.equipped"
        )
    features = features.float() if features.dtype.itemsize < 4 else features
    flat = features.reshape(*features.shape[:2], -1)
    return flat.mean(2) if pool == "space" else flat.mean(1)


def discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of real against fake, ln 2 at l = 0.

    real, fake: (B, N) logits. Returns (B,). ValueError where their shapes differ. Goodfellow et
    al. 2014, https://arxiv.org/abs/1406.2661.
    """
    same_shape(real=real, fake=fake)
    return mean_flat(F.softplus(-real) + F.softplus(fake)) / 2


def generator(fake: Tensor, bound: float = 10.0) -> Tensor:
    """The non-saturating loss softplus(-l) of generated samples.

    Args:
        fake: (B, N), their logits.
        bound: logits are clamped to +- this, and have no gradient beyond it.

    Returns: (B,). Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661; the clamp is that of
    SiDA, https://arxiv.org/abs/2410.14919.
    """
    return mean_flat(F.softplus(-fake.clamp(-bound, bound)))


def averaged(loss: Tensor, weight: Tensor, average: Average) -> Tensor:
    """Weigh the adversarial loss: w_i l_i, or w_i mean_j l_j.

    Args:
        loss: (B,), of each sample.
        weight: (B, 1, ..., 1) or ().
        average: "sample" for the first, "batch" for the second (SiDA,
            https://arxiv.org/abs/2410.14919).

    Returns: (B,). Raises ValueError for another `average`.
    """
    if average not in ("batch", "sample"):
        raise ValueError(f"average is 'batch' or 'sample', got {average!r}")
    return weight.flatten() * (loss.mean() if average == "batch" else loss)
