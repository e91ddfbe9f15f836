"""The U-Net that DDPM++, NCSN++, ADM and EDM2 share: its layout, and its calls.

With L levels of n blocks, at resolutions r, r/2, ..., the encoder is

    conv, block_0 .. block_{n-1}    at r,    then    down, block_0 .. block_{n-1}    at each below,

every one of which leaves its output for the decoder, and the decoder, from the lowest level up,

    in_0, in_1, block_0 .. block_n    at the lowest,    then    up, block_0 .. block_n    at each,

every `block` of which first takes the latest output left over. Names carry the resolution, as in
`enc.16x16_block0` (Karras et al. 2022, https://arxiv.org/abs/2206.00364, appendix F; Karras et
al. 2024, https://arxiv.org/abs/2312.02696, figure 21).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding

Resample = Literal["keep", "up", "down"]


class MakeBlock(Protocol):
    """How a network makes its blocks, which are called with features and embedding."""

    def __call__(
        self,
        side: Literal["enc", "dec"],
        inputs: int,
        outputs: int,
        resample: Resample = "keep",
        attention: bool = False,
    ) -> nn.Module: ...


class EncoderFeatureUNet(nn.Module, ABC):
    """A U-Net F that returns its encoder's features (see `fewstep.diffusion.encoder_features`).

    In all calls x: (B, C, H, W), noise: (B,) the noise label, labels: (B, classes) or None,
    augment: (B, A) or None; F is (B, out, H, W), features are (B, F, h, w).
    """

    feature_shape: tuple[int, int, int]
    """(F, h, w)."""
    out_norm: nn.Module
    out_conv: nn.Module
    attend_last_only = False
    """Whether only the last decoder block of a resolution has attention."""

    def build(
        self,
        resolution: int,
        first: nn.Module,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        make: MakeBlock,
    ) -> int:
        """Make `enc`, which starts with `first` of width `stem`, and `dec`.

        widths: channels of each level, from fine to coarse; blocks: residual blocks of a level of
        the encoder; attention: resolutions with self-attention. Returns the channels of the last
        decoder block; ValueError where the levels do not fit the resolution.
        """
        if not widths or resolution >> (len(widths) - 1) < 1:
            raise ValueError(f"{len(widths)} levels do not fit img_resolution {resolution}")
        sizes = [resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{resolution}x{resolution}_conv"] = first
        width, skips = stem, [stem]
        for size, outs in zip(sizes, widths, strict=True):
            name = f"{size}x{size}"
            if size != resolution:
                self.enc[f"{name}_down"] = make("enc", width, width, "down")
                skips.append(width)
                self.input_pyramid(name, width)
            for index in range(blocks):
                block = make("enc", width, outs, attention=size in attention)
                self.enc[f"{name}_block{index}"] = block
                width = outs
                skips.append(width)
        self.feature_shape = width, sizes[-1], sizes[-1]
        for size, outs in zip(reversed(sizes), reversed(widths), strict=True):
            name = f"{size}x{size}"
            if size == sizes[-1]:
                self.dec[f"{name}_in0"] = make("dec", width, width, attention=True)
                self.dec[f"{name}_in1"] = make("dec", width, width)
            else:
                self.dec[f"{name}_up"] = make("dec", width, width, "up")
            for index in range(blocks + 1):
                attend = size in attention and (index == blocks or not self.attend_last_only)
                block = make("dec", width + skips.pop(), outs, attention=attend)
                self.dec[f"{name}_block{index}"] = block
                width = outs
            self.output_pyramid(name, width, size == sizes[-1], size == resolution)
        return width

    def input_pyramid(self, name: str, width: int) -> None:
        """Add layers after a downsampling to this width; by default none."""

    def output_pyramid(self, name: str, width: int, coarsest: bool, finest: bool) -> None:
        """Add layers after a level of the decoder; by default none."""

    @property
    @abstractmethod
    def time_embedding(self) -> TimeEmbedding:
        """Where the noise label is embedded (`fewstep.diffusion.extra_inputs`)."""

    @abstractmethod
    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """The embedding of everything but x: (B, E)."""

    def run_encoder(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The outputs that the decoder takes up again, in order; the last one is the features."""
        skips: list[Tensor] = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else block(x, emb)
            skips.append(x)
        return skips

    def run_decoder(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """F from the encoder's outputs, which are removed from `skips`."""
        x = skips[-1]
        for name, block in self.dec.items():
            x = block(self.join(x, skips.pop()) if "block" in name else x, emb)
        return self.out(x)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """The input of a decoder block: features and an encoder output, concatenated."""
        return torch.cat([x, skip], 1)

    def out(self, x: Tensor) -> Tensor:
        """F from the output of the last decoder block."""
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out

    def forward(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """F(x; noise, labels, augment)."""
        emb = self.embed(noise, labels, augment)
        return self.run_decoder(self.run_encoder(x, emb), emb)

    def encode(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """The features alone."""
        return self.run_encoder(x, self.embed(noise, labels, augment))[-1]

    def forward_with_features(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(F, features) from one pass."""
        emb = self.embed(noise, labels, augment)
        skips = self.run_encoder(x, emb)
        features = skips[-1]
        return self.run_decoder(skips, emb), features
