"""Pictures of samples, and frozen networks that look at them: `PictureFeatures` and `Reward`.

Some losses are on pictures, also where samples are latents: a distance in features, a
discriminator over a vision network, a reward. `pictures_of(teacher, x)` decodes samples with the
decoder that the teacher brought (`give_decoder`), and lets gradients through; samples of a teacher
that brought none are pictures. What looks at them is a frozen dataclass in a field of the method,
so that a run records it; its network is loaded at first use, and is neither trained nor part of a
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.types import Cond
from fewstep.losses.distance import squared_norm


class _Decoder:
    """A decoder beside a network; copies of the network share it."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self.decode = decode

    def __deepcopy__(self, _memo: Any) -> _Decoder:
        return self


def give_decoder(denoiser: object, decode: Callable[[Tensor], Tensor]) -> None:
    """Have `pictures_of(denoiser, x)` be `decode(x)`, in full precision.

    Args:
        denoiser: a teacher; its state dict and its parameters stay as they are.
        decode: x_0 (B, *) -> pictures (B, C, H, W) in about [-1, 1], differentiable.
    """
    denoiser.decoder = _Decoder(decode)  # type: ignore[attr-defined]


def pictures_of(teacher: object, x: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in about [-1, 1] of samples x (B, *), with their gradient.

    They are decoded in float32 or better: a decoder in half precision overflows. ValueError where
    the samples of a teacher without a decoder are no pictures.
    """
    decoder = getattr(teacher, "decoder", None)
    if isinstance(decoder, _Decoder):
        with torch.autocast(_caster(x), enabled=False):
            x = decoder.decode(x if x.dtype == torch.float64 else x.float())
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"a loss on pictures needs (B, 1 or 3, H, W), got {tuple(x.shape)}; give it a teacher "
            "of pictures, or one that brings a decoder of its latents"
        )
    return x


class PictureFeatures(ABC):
    """A frozen network that reads pictures; a frozen dataclass, whose fields name the network.

    One of a file has fields `path` and `sha256`, and fills in the digest when it is `settled`.
    """

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        """Features of pictures (B, 1 or 3, H, W) in [-1, 1]: (B, F, *) each, with gradients."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Shape of each of the features, (F, h, w), or (F,) for tokens and vectors.

        For a discriminator's heads; ValueError where it is not known.
        """
        raise ValueError(
            f"{type(self).__name__} does not tell the shapes of its features, which a "
            "discriminator's heads are made for; give it a property shapes"
        )

    def settled(self) -> PictureFeatures:
        """The same with the digest of its file; ValueError where that is missing or another."""
        return self


class Reward(ABC):
    """What a picture is worth; a frozen dataclass, as `PictureFeatures` is."""

    @abstractmethod
    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        """Rewards (B,) of pictures (B, 1 or 3, H, W) in [-1, 1], differentiable in them.

        cond: the conditions that the pictures were made for.
        """

    def settled(self) -> Reward:
        """The same with the digest of its file; ValueError where that is missing or another."""
        return self


def rewards_of(reward: Reward, teacher: object, x: Tensor, cond: Cond) -> Tensor:
    """What samples x (B, *) are worth: (B,), with the gradient through decoder and reward.

    Both are in float32 or better. ValueError where samples are no pictures, and for a reward that
    does not give one number a picture.
    """
    pictures = pictures_of(teacher, x)
    if pictures.dtype != torch.float64:
        pictures = pictures.float()
    with torch.autocast(_caster(x), enabled=False):
        worth = reward(pictures, cond)
    if worth.shape != (len(x),):
        raise ValueError(
            f"{type(reward).__name__} gives one number a picture, ({len(x)},), got "
            f"{tuple(worth.shape)}"
        )
    return worth


def _caster(x: Tensor) -> str:
    """The device type whose autocast applies; the CPU's for "meta", where it does nothing."""
    return "cpu" if x.device.type == "meta" else x.device.type


def feature_distance(features: PictureFeatures, x: Tensor, y: Tensor) -> Tensor:
    """How far pictures are apart in features: (B, C, H, W) twice -> (B,).

    The sum over layers of the mean over positions of |f/|f| - g/|g||^2, norms over channels: the
    distance of LPIPS with all weights one (Zhang et al. 2018, equation 1,
    https://arxiv.org/abs/1801.03924).
    """
    return features_apart(features(x), features(y))


def features_apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The distance of `feature_distance`, from the features (B, F, *) of each layer -> (B,)."""
    terms = []
    for f, g in zip(first, second, strict=True):
        apart = _unit(f) - _unit(g)
        positions = apart[0, 0].numel()
        terms.append(squared_norm(apart).flatten() / positions)
    return torch.stack(terms).sum(0)


def _unit(f: Tensor) -> Tensor:
    """f over its norm along channels; (B, F, *)."""
    return f * ((f**2).sum(1, keepdim=True) + 1e-10).rsqrt()
