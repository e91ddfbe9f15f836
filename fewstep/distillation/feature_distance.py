"""Distances of samples: of their own, in features of pictures, and in the teacher's features.

Perceptual distances read pictures (`fewstep.distillation.pictures.feature_distance`). Latents have
a network of their own that can read them, the teacher:

    d(x, y) = sum over layers, mean over places of |f(T x)/|f(T x)| - f(T y)/|f(T y)||^2,

f the vector of channels at a place. T is a random movement and random noise, the same for both:
one such view alone has blind spots that an optimiser finds, the mean of all has none (Kang et al.
2024, https://arxiv.org/abs/2405.05967, whose E-LatentLPIPS moves and cuts latents; its network is
a classifier of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.diffusion.encoder_features import layer_features, require_encoder_features
from fewstep.diffusion.noise_path import same_shape
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Cond, Denoiser
from fewstep.distillation.augment import Augment
from fewstep.distillation.fake_score import add_noise, augment_samples
from fewstep.distillation.method import need_draws
from fewstep.distillation.pictures import (
    PictureFeatures,
    feature_distance,
    features_apart,
    pictures_of,
)
from fewstep.losses.distance import Distance, regression


@dataclass(frozen=True)
class FeatureDistance:
    """The distance of samples in the teacher's features.

    Attributes:
        times: the distribution of the noise levels that both are read at.
        layers: names of the teacher's modules whose outputs are read, as of `Discriminator`;
            (): its encoder's.
        augment: how both are moved first, alike.
    """

    times: TimeLaw = LogNormal()
    layers: tuple[str, ...] = ()
    augment: Augment | None = None

    def __call__(
        self, teacher: Denoiser, x: Tensor, y: Tensor, batch: Batch, cond: Cond
    ) -> Tensor:
        """d(x, y): (B,), with a gradient in both.

        Args:
            teacher: the frozen network.
            x, y: (B, *), the samples.
            batch: its draws are used, under "features".
            cond: the condition of both.

        Raises ValueError where the shapes differ or the network has no features.
        """
        same_shape(prediction=x, x0=y)
        at = batch._replace(draws=need_draws(batch).under("features"))
        first, second = (self._read(teacher, sample, at, cond) for sample in (x, y))
        return features_apart(first, second)

    def _read(self, teacher: Denoiser, x: Tensor, batch: Batch, cond: Cond) -> list[Tensor]:
        x, labels = augment_samples(self.augment, x, batch)
        n = add_noise(teacher.path, x, self.times, batch)
        inputs: Any = (n.xt, n.t, cond, *labels)
        if self.layers:
            return layer_features(teacher, self.layers, *inputs)
        return [require_encoder_features(teacher).encode(*inputs)]


AnyDistance = Distance | PictureFeatures | FeatureDistance


def sample_distance(
    distance: AnyDistance, teacher: Denoiser, x: Tensor, y: Tensor, batch: Batch, cond: Cond
) -> Tensor:
    """d(x, y) of samples (B, *) -> (B,).

    Of a `Distance` that of the samples over their dimensions, of `PictureFeatures` that of their
    pictures in these features, of a `FeatureDistance` its own; the other arguments are as there.
    """
    if isinstance(distance, FeatureDistance):
        return distance(teacher, x, y, batch, cond)
    if isinstance(distance, PictureFeatures):
        same_shape(prediction=x, x0=y)
        return feature_distance(distance, pictures_of(teacher, x), pictures_of(teacher, y))
    return regression(distance, x, y)
