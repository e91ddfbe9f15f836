"""A learned discriminator head: one logit a sample from encoder features.

DMD2 (Yin et al. 2024, https://arxiv.org/abs/2405.14867, section 4.3) puts a few convolutions on
the fake score's features at its lowest resolution. From features (F, h, w), as published,

    [ conv 4x4 stride 2, norm, SiLU ]  until no side is longer than 4,
    conv over all that is left, norm, SiLU,    conv 1x1 to one logit,

all F channels wide: two large convolutions for 8x8 (ImageNet 64, Stable Diffusion 1.5), four for
SDXL's 32x32. The norm is over groups, at most 32, of four channels or more. Tokens, on which
nothing is published, have each a logit by the same layers on 1x1, a perceptron of two layers;
the sample's is their mean.

The head is a part of the fake score (`DenoiserWithHead`), which then returns the logits in place
of its encoder's features. So it is trained, averaged over processes, sharded and stored with it,
in full beside adapters, and no loop and no loss knows of it; the student, which is shipped, has
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import feature_shape, require_encoder_features


class DiscriminatorHead(nn.Module):
    """Features (B, F, *) -> logits (B, 1), for features of `shape`: (F, h, w), or (F,) tokens."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, *sides = shape
        sides = sides or [1, 1]
        layers: list[nn.Module] = []
        while max(sides) > 4:
            layers += _activated(channels, nn.Conv2d(channels, channels, 4, 2, 1))
            sides = [side // 2 for side in sides]
        layers += _activated(channels, nn.Conv2d(channels, channels, (sides[0], sides[1])))
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, *) features -> (B, 1) logits; tokens are averaged over."""
        x = features if features.ndim == 4 else _places(features)
        weight: Any = self.layers[0].weight
        out: Tensor = (
            self.layers(x.to(weight.dtype)).reshape(len(features), -1).mean(1, keepdim=True)
        )
        return out


def _activated(channels: int, conv: nn.Module) -> list[nn.Module]:
    groups = next(
        n for n in range(32, 0, -1) if not channels % n and (channels >= 4 * n or n == 1)
    )
    return [conv, nn.GroupNorm(groups, channels), nn.SiLU()]


def _places(features: Tensor) -> Tensor:
    """(B, F) or (B, F, N) -> (B N, F, 1, 1)."""
    return features.reshape(*features.shape[:2], -1).mT.flatten(0, 1)[:, :, None, None]


class DenoiserWithHead(nn.Module):
    """A denoiser with a discriminator head, which returns logits (B, 1) as its encoder features.

    The head starts from the same numbers everywhere. ValueError where the denoiser has no encoder
    features, or features of unknown shape.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        shape = feature_shape(net)
        like = next(net.parameters())
        with torch.random.fork_rng(devices=[]), torch.device("meta" if like.is_meta else "cpu"):
            torch.manual_seed(0)
            self.head = DiscriminatorHead(shape)
        self.head.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.net = net

    def forward(self, *args: Any) -> Tensor:
        """The denoiser's x_0-prediction: (B, *)."""
        out: Tensor = self.net(*args)
        return out

    def encode(self, *args: Any) -> Tensor:
        """The logits (B, 1) alone; the decoder is not run."""
        out: Tensor = self.head(require_encoder_features(self.net).encode(*args))
        return out

    def forward_with_features(self, *args: Any) -> tuple[Tensor, Tensor]:
        """(the denoiser's x_0-prediction, the logits) from one pass."""
        out, features = require_encoder_features(self.net).forward_with_features(*args)
        return out, self.head(features)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the denoiser's, such as its path."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)
