"""The U-Nets of EDM: DDPM++ and NCSN++ (`SongUNet`), ADM (`DhariwalUNet`).

Both compute F(x; noise label, class label, augment label) by an encoder of `channel_mult` levels,
each at half the resolution of the one before, and a decoder that meets the encoder's features
again in reverse order. They differ in their blocks (see `edm_layers`), in how the embedding is
made, where attention sits, and in the image pyramids that NCSN++ may carry along:

    skip       inputs at every resolution are added to the features by a 1x1 convolution, and the
               decoder sums images of all resolutions (Karras et al. 2020, StyleGAN2);
    residual   the input is convolved and downsampled alongside, and at every level features and
               pyramid both become (h + a) / sqrt(2).

Song et al. 2021, https://arxiv.org/abs/2011.13456; Dhariwal & Nichol 2021,
https://arxiv.org/abs/2105.05233; settings of the published models in Karras et al. 2022,
https://arxiv.org/abs/2206.00364, table 7. Arguments and parameter names are those of the
published weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding
from fewstep.nets.edm_layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from fewstep.nets.unet import EncoderFeatureUNet, MakeBlock, Resample


def _drop(net: nn.Module, labels: Tensor, share: float) -> Tensor:
    """In training, each sample loses its label with probability `share`."""
    if not (net.training and share):
        return labels
    keep = torch.rand(len(labels), 1, device=labels.device) >= share
    return labels * keep.to(labels.dtype)


def _block(style: BlockStyle) -> MakeBlock:
    def make(
        side: str, inputs: int, outputs: int, resample: Resample = "keep", attention: bool = False
    ) -> UNetBlock:
        return UNetBlock(inputs, outputs, style, resample, attention)

    return make


class SongUNet(EncoderFeatureUNet):
    """DDPM++ (the defaults); NCSN++ with fourier embedding, residual encoder, filter 1 3 3 1."""

    attend_last_only = True

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        _one_of("embedding_type", embedding_type, "positional", "fourier")
        _one_of("encoder_type", encoder_type, "standard", "skip", "residual")
        _one_of("decoder_type", decoder_type, "standard", "skip")
        self.label_dropout = label_dropout
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.image_channels, self.out_channels = in_channels, out_channels
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init = Init("xavier_uniform")
        self.style = style = BlockStyle(
            emb_channels=emb,
            dropout=dropout,
            init=init,
            init_zero=Init("xavier_uniform", 1e-5),
            init_attn=Init("xavier_uniform", math.sqrt(0.2)),
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            heads=1,
            taps=tuple(resample_filter),
            project=True,
            adaptive_scale=False,
        )
        positional = embedding_type == "positional"
        self.map_noise = (
            PositionalEmbedding(noise, True) if positional else FourierEmbedding(noise)
        )
        self.map_label = Linear(label_dim, noise, init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, init, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise, emb, init)
        self.map_layer1 = Linear(emb, emb, init)
        widths = [model_channels * m for m in channel_mult]
        first = Conv2d(in_channels, model_channels, 3, init)
        layout = widths, num_blocks, attn_resolutions, _block(style)
        self.build(img_resolution, first, model_channels, *layout)

    def input_pyramid(self, name: str, width: int) -> None:
        """Add the layers that feed the downsampled input in, if `encoder_type` has any."""
        image, style, taps = self.image_channels, self.style, self.style.taps
        if self.encoder_type == "skip":
            self.enc[f"{name}_aux_down"] = Conv2d(image, image, 0, None, "down", taps)
            self.enc[f"{name}_aux_skip"] = Conv2d(image, width, 1, style.init)
        elif self.encoder_type == "residual":
            pyramid = Conv2d(image, width, 3, style.init, "down", taps, fused=True)
            self.enc[f"{name}_aux_residual"] = pyramid
            self.image_channels = width

    def output_pyramid(self, name: str, width: int, coarsest: bool, finest: bool) -> None:
        """Add the layers that turn a level's features into output channels.

        With `decoder_type` "skip" every level has them, otherwise the finest alone.
        """
        style = self.style
        outs, skip = self.out_channels, self.decoder_type == "skip"
        if skip and not coarsest:
            self.dec[f"{name}_aux_up"] = Conv2d(outs, outs, 0, None, "up", style.taps)
        if skip or finest:
            self.dec[f"{name}_aux_norm"] = GroupNorm(width, style.eps)
            self.dec[f"{name}_aux_conv"] = Conv2d(width, outs, 3, style.init_zero)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The second layer of the noise level, before its activation."""
        return TimeEmbedding(self.map_layer1, self.map_layer1.out_features)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Sines first here; labels and augmentation join before the two layers."""
        cos, sin = self.map_noise(noise).chunk(2, 1)
        emb = torch.cat([sin, cos], 1)
        if self.map_label is not None and labels is not None:
            scale = math.sqrt(self.map_label.in_features)
            emb = emb + self.map_label(_drop(self, labels, self.label_dropout) * scale)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def run_encoder(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The encoder's outputs for the decoder, in order; the last one is the features."""
        skips: list[Tensor] = []
        image = x
        for name, block in self.enc.items():
            match name.partition("_")[2]:
                case "conv":
                    skips.append(block(x))
                case "aux_down":
                    image = block(image)
                case "aux_skip":
                    skips[-1] = skips[-1] + block(image)
                case "aux_residual":
                    image = skips[-1] = (skips[-1] + block(image)) * math.sqrt(0.5)
                case _:
                    skips.append(block(skips[-1], emb))
        return skips

    def run_decoder(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """F from the encoder's outputs, which are removed from `skips`."""
        x, image, normed = skips[-1], None, skips[-1]
        for name, block in self.dec.items():
            match name.partition("_")[2]:
                case "in0" | "in1" | "up":
                    x = block(x, emb)
                case "aux_up":
                    image = block(image)
                case "aux_norm":
                    normed = block(x)
                case "aux_conv":
                    part = block(F.silu(normed))
                    image = part if image is None else image + part
                case _:
                    x = block(torch.cat([x, skips.pop()], 1), emb)
        assert isinstance(image, Tensor)
        return image


class DhariwalUNet(EncoderFeatureUNet):
    """ADM; the defaults are those of the ImageNet-64 model."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))
        zero = Init("kaiming_uniform", 0.0)
        style = BlockStyle(emb, dropout, init, init_zero=zero, init_attn=init)
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, zero, bias=False) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb, init)
        self.map_layer1 = Linear(emb, emb, init)
        unit = Init("kaiming_normal", math.sqrt(max(label_dim, 1)))
        self.map_label = Linear(label_dim, emb, unit, bias=False) if label_dim else None
        widths = [model_channels * m for m in channel_mult]
        first = Conv2d(in_channels, widths[0], 3, init)
        layout = widths, num_blocks, attn_resolutions, _block(style)
        width = self.build(img_resolution, first, widths[0], *layout)
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3, zero)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The second layer of the noise level, before its activation."""
        return TimeEmbedding(self.map_layer1, self.map_layer1.out_features)

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution."""
        return self.out_conv

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Augmentation joins before the two layers, labels after them."""
        emb = self.map_noise(noise)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(_drop(self, labels, self.label_dropout))
        return F.silu(emb)


def _one_of(name: str, value: object, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")
