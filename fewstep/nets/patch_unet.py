"""A small class-conditional U-Net on patches: for pictures of 16 to 64 pixels and small machines.

The picture is cut into patches of p by p pixels, which become the channels of a picture p times
smaller (a convolution on it is a strided one on pixels; cf. Luhman & Luhman 2022,
https://arxiv.org/abs/2207.04316), so that no layer ever works at full resolution. Between lies
the U-Net of ADM (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233): `fewstep.nets.unet`
has its layout and `fewstep.nets.edm_layers` its blocks. The last convolution starts at zero, hence
F = 0 and, behind EDM's preconditioning, D(x_t) = c_skip x_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding, geometric_frequencies
from fewstep.diffusion.model import Net
from fewstep.nets.edm_layers import BlockStyle, Conv2d, GroupNorm, Init, Linear, UNetBlock
from fewstep.nets.unet import EncoderFeatureUNet, Resample


class PatchUNetBody(EncoderFeatureUNet):
    """F(x, label, cond): (B, C, S, S), (B,), (B,) int64 or None -> (B, C, S, S).

    cond = `classes`, like None, means no label. `encode` and `forward_with_features` take the
    same arguments and agree exactly with the call; features are (B, F, h, h) of the coarsest
    level. A fourth argument, `augment`, is ignored.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, config: PatchUNet) -> None:
        super().__init__()
        channels, size = shape[0], shape[1]
        self.classes, self.patch = classes, config.patch
        width, emb = config.width, 4 * config.width
        init = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))
        zero = Init("kaiming_uniform", 0.0)
        style = BlockStyle(emb, config.dropout, init, init_zero=zero, init_attn=init, heads=1)
        self.frequencies: Tensor
        self.register_buffer("frequencies", geometric_frequencies(-4, 3, width // 2))
        self.map_noise = Linear(2 * (width // 2), emb, init)
        self.map_label = nn.Embedding(classes + 1, emb) if classes else None
        self.map_both = Linear(emb, emb, init)

        def make(
            side: Literal["enc", "dec"],
            inputs: int,
            outputs: int,
            resample: Resample = "keep",
            attention: bool = False,
        ) -> UNetBlock:
            return UNetBlock(inputs, outputs, style, resample, attention)

        inside = channels * config.patch**2
        widths = [width * mult for mult in config.mults]
        first = Conv2d(inside, widths[0], 3, init)
        layout = widths, config.blocks, config.attention, make
        last = self.build(size // config.patch, first, widths[0], *layout)
        self.out_norm = GroupNorm(last)
        self.out_conv = Conv2d(last, inside, 3, zero)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The last layer of noise and label, before its activation."""
        return TimeEmbedding(self.map_both, self.map_both.out_features)

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution, whose result is F cut into patches."""
        return self.out_conv

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """The noise label as waves of 1/16 to 8 periods a unit, plus the class: (B, E)."""
        phase = noise[:, None] * self.frequencies
        emb = F.silu(self.map_noise(torch.cat([phase.cos(), phase.sin()], 1)))
        if self.map_label is not None:
            null = torch.full((noise.shape[0],), self.classes, device=noise.device)
            emb = emb + self.map_label(null if labels is None else labels)
        return F.silu(self.map_both(emb))

    def run_encoder(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The encoder's outputs for the picture cut into patches."""
        return super().run_encoder(F.pixel_unshuffle(x, self.patch), emb)

    def out(self, x: Tensor) -> Tensor:
        """F, put together from its patches: (B, C, S, S)."""
        return F.pixel_shuffle(super().out(x), self.patch)


@dataclass(frozen=True)
class PatchUNet(Net):
    """A small U-Net on patches.

    The defaults: the best on 16x16 digits of five settings after equal training time.
    """

    width: int = 48
    """Channels of the finest level; a quarter of the embedding's."""
    mults: tuple[int, ...] = (1, 1)
    """Channels of each level, from fine to coarse, in units of `width`."""
    blocks: int = 1
    """Residual blocks of each level of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = ()
    """Resolutions, in patches, with self-attention; the decoder's first block always has it."""
    patch: int = 2
    """Side of the patches; 1 for pixels."""
    dropout: float = 0.0
    """Share of activations dropped in training, below 1."""

    def __post_init__(self) -> None:
        if self.width < 4 or self.blocks < 0 or self.patch < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "PatchUNet needs width >= 4, blocks >= 0, patch >= 1 and dropout in [0, 1), "
                f"got {self}"
            )
        if not self.mults or min(self.mults) < 1:
            raise ValueError(f"PatchUNet.mults are positive whole numbers, got {self.mults}")

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """`PatchUNetBody` for square pictures (C, S, S); ValueError where S does not fit."""
        side = self.patch << (len(self.mults) - 1)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % side:
            raise ValueError(
                f"PatchUNet with patch {self.patch} and {len(self.mults)} levels needs square "
                f"pictures (C, S, S) with S a multiple of {side}, got {shape}"
            )
        return PatchUNetBody(shape, classes, self)
