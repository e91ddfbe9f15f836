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

A head of pairs takes the features of two states, put together channel by channel: those of what is
judged, and those of the state that it was made from (SDXL-Lightning, Lin et al. 2024,
https://arxiv.org/abs/2402.13929, equation 22). Where it is not told of the second, zeros stand in
their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import feature_shape, require_encoder_features


def joined(features: Tensor, others: Tensor | None) -> Tensor:
    """What a head of pairs takes: (B, F, *) twice -> (B, 2 F, *); None stands for zeros."""
    return torch.cat([features, torch.zeros_like(features) if others is None else others], 1)


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


class Heads(nn.Module):
    """One head for each of several features of a frozen network; all that is trained of a judge.

    The heads start from the same numbers everywhere. shapes: of the features, (F, h, w), or (F,)
    for tokens; like: a tensor of the device and, if it is not a shorter one, the precision.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
        super().__init__()
        with _same_start(like):
            self.heads = nn.ModuleList(DiscriminatorHead(shape) for shape in shapes)
        self.heads.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.shapes = [tuple(shape) for shape in shapes]

    def forward(self, features: Sequence[Tensor], first: int = 0) -> Tensor:
        """Features (B, F, *), one of each layer -> logits (B, 1, layers).

        first: the head of the first layer; those of the others follow it.
        """
        there = slice(first, first + len(features))
        for one, shape in zip(features, self.shapes[there], strict=True):
            if one.shape[1] != shape[0] or one.shape[2 : len(shape) + 1] != shape[1:]:
                raise ValueError(
                    f"heads for features of shape {shape} got {tuple(one.shape[1:])}: the "
                    "layers of a judge have outputs of the shape of the encoder features"
                )
        heads = self.heads[there]
        logits = [head(one) for head, one in zip(heads, features, strict=True)]
        return torch.stack(logits, 2)


def head_shape(net: nn.Module, pair: bool) -> tuple[int, ...]:
    """What a head on the encoder of `net` takes, of one state or of two; errors as there."""
    channels, *sides = feature_shape(net)
    return (2 * channels if pair else channels, *sides)


@contextmanager
def _same_start(like: Tensor) -> Iterator[None]:
    """Within the block new weights are the same everywhere, or on meta where `like` is."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if like.is_meta else "cpu"):
        torch.manual_seed(0)
        yield


class DenoiserWithHead(nn.Module):
    """A denoiser with a discriminator head, which returns logits (B, 1) as its encoder features.

    The head starts from the same numbers everywhere. pair: whether it is one of pairs. ValueError
    where the denoiser has no encoder features, or features of unknown shape.
    """

    def __init__(self, net: nn.Module, pair: bool = False) -> None:
        super().__init__()
        shape, self.pair = head_shape(net, pair), pair
        like = next(net.parameters())
        with _same_start(like):
            self.head = DiscriminatorHead(shape)
        self.head.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.net = net

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """The denoiser's x_0-prediction: (B, *)."""
        out: Tensor = self.net(*args, **named)
        return out

    def encode(
        self, *args: Any, beside: tuple[Tensor, Tensor] | None = None, **named: Any
    ) -> Tensor:
        """The logits (B, 1) alone; the decoder is not run.

        beside: for a head of pairs, the other state (B, *) and its time (B,).
        """
        net = require_encoder_features(self.net)
        features: Any = net.encode(*args, **named)
        if self.pair:
            others = None if beside is None else net.encode(*beside, *args[2:], **named)
            features = joined(features, others)
        out: Tensor = self.head(features)
        return out

    def forward_with_features(self, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """(the denoiser's x_0-prediction, the logits) from one pass."""
        out, features = require_encoder_features(self.net).forward_with_features(*args, **named)
        return out, self.head(features)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the denoiser's, such as its path."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)
