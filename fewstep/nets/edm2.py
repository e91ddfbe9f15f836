"""EDM2: the magnitude-preserving U-Net (Karras et al. 2024, https://arxiv.org/abs/2312.02696).

Activations, weights and updates keep their magnitudes by construction rather than by group
normalisation (section 2 and appendix B). With |.| the root mean square over a vector:

    weights     w' = w / |w| / sqrt(fan in), so that unit inputs give unit outputs; while training
                w itself is also set to w / |w| before use ("forced weight normalisation"), so
                that the learning rate sets the relative size of updates       (equation 47, 66)
    sum         ((1-t) a + t b) / sqrt((1-t)^2 + t^2)                                (equation 88)
    concat      of a and b with the factors that keep |.| and their balance t       (equation 103)
    silu        silu(x) / 0.596                                                      (equation 81)
    fourier     sqrt(2) cos(2 pi (f x + p)), f ~ N(0, 1), p ~ U(0, 1)                (equation 75)

Blocks, embedding and layout are those of figure 21. A head of the noise level estimates the loss'
log-variance u(sigma), for the weighting of equation 21,

    L = E lambda(sigma) / exp(u(sigma)) |D(x + n) - x|^2 + u(sigma).

Parameter names and shapes are those of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding
from fewstep.diffusion.noise_path import VE
from fewstep.nets.activation_checkpointing import again
from fewstep.nets.attention import attend, split_heads
from fewstep.nets.edm_layers import downsample, filter_2d, upsample
from fewstep.nets.precond import Preconditioned, Scaling, edm_scaling
from fewstep.nets.unet import EncoderFeatureUNet, Resample


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """x / (|x| + eps), |x| being taken over `dim`; by default over all but the first."""
    dims = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_wide(x.dtype))
    norm = eps + norm * math.sqrt(norm.numel() / x.numel())
    out: Tensor = x / norm.to(x.dtype)
    return out


def mp_silu(x: Tensor) -> Tensor:
    """silu, scaled to unit magnitude for normal input."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The balanced sum of two tensors of unit magnitude."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(B, m, ...) and (B, n, ...) to (B, m + n, ...), with share t of the second."""
    m, n = a.shape[1], b.shape[1]
    scale = math.sqrt(m + n) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(m)), b * (scale * t / math.sqrt(n))], 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class MPFourier(nn.Module):
    """Random features of a noise label: (B,) -> (B, n); frequencies and phases are fixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.freqs: Tensor
        self.phases: Tensor
        self.register_buffer("freqs", torch.randn(channels).mul_(2 * math.pi))
        self.register_buffer("phases", torch.rand(channels).mul_(2 * math.pi))

    def forward(self, x: Tensor) -> Tensor:
        """(B,) -> (B, channels), each of magnitude one in expectation."""
        phase = x[:, None] * self.freqs.to(x.dtype) + self.phases.to(x.dtype)
        return phase.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A linear layer (kernel = 0) or convolution with normalised weights and no bias."""

    rewrites_weight = True
    """In training each call normalises the stored weight (see `fewstep.training.sharding`)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.out_channels = out_channels
        size = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *size))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """x: (B, in, ...) -> (B, out, ...), scaled by `gain`."""
        if self.training and not again():
            self.force()
        w = normalize(self.weight.to(_wide(x.dtype)))
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.conv2d(x, w, padding=w.shape[-1] // 2) if w.ndim == 4 else F.linear(x, w)

    def force(self) -> None:
        """Forced weight normalisation, in place.

        Done through `.data`, hidden from autograd: a second forward before the backward, as a
        discriminator needs, must not invalidate what the first one saved, and does not change
        it beyond rounding, since weights that were normalised before are a fixed point.
        """
        self.weight.data.copy_(normalize(self.weight.data))


@dataclass(frozen=True)
class MPStyle:
    """What all blocks have in common."""

    emb_channels: int
    taps: tuple[float, ...] = (1, 1)
    """The published `resample_filter`."""
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    """Share of the residual branch."""
    attn_balance: float = 0.3
    """Share of the attention branch."""
    clip_act: float | None = 256.0
    """Bound of a block's output; None: no bound."""


class Block(nn.Module):
    """Figure 21: encoder blocks normalise every pixel of their input, decoder blocks do not."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: MPStyle,
        flavor: Literal["enc", "dec"],
        resample: Resample = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style, self.flavor, self.resample = style, flavor, resample
        self.out_channels = outs = out_channels
        self.heads = outs // style.channels_per_head if attention else 0
        if self.heads and outs % self.heads:
            raise ValueError(f"{outs} channels do not split into {self.heads} attention heads")
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outs if flavor == "enc" else in_channels, outs, 3)
        self.emb_linear = MPConv(style.emb_channels, outs)
        self.conv_res1 = MPConv(outs, outs, 3)
        self.conv_skip = MPConv(in_channels, outs, 1) if in_channels != outs else None
        self.attn_qkv = MPConv(outs, 3 * outs, 1) if self.heads else None
        self.attn_proj = MPConv(outs, outs, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, in, h, w), emb: (B, E) -> (B, out, h', w')."""
        style = self.style
        if self.resample != "keep":
            f = x.new_full((1, 1, 2, 2), 1 / 4)
            f = f if style.taps == (1, 1) else filter_2d(style.taps).to(x)
            x = upsample(x, f) if self.resample == "up" else downsample(x, f)
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, 1)
        gain = self.emb_linear(emb, self.emb_gain) + 1
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * gain[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, style.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, style.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            seen = attend(normalize(split_heads(self.attn_qkv(x), self.heads), 2), x)
            x = mp_sum(x, self.attn_proj(seen), style.attn_balance)
        return x if style.clip_act is None else x.clamp(-style.clip_act, style.clip_act)


class UNet(EncoderFeatureUNet):
    """The EDM2 network; further arguments are those of the blocks, `MPStyle`."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        noise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        style = MPStyle(emb, tuple(resample_filter), **block_kwargs)
        self.label_dim, self.label_balance = label_dim, label_balance
        self.concat_balance = concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb)
        self.emb_label = MPConv(label_dim, emb) if label_dim else None

        def make(
            side: Literal["enc", "dec"],
            inputs: int,
            outputs: int,
            resample: Resample = "keep",
            attention: bool = False,
        ) -> Block:
            return Block(inputs, outputs, style, side, resample, attention)

        first = MPConv(img_channels + 1, widths[0], 3)
        layout = widths, num_blocks, attn_resolutions, make
        width = self.build(img_resolution, first, widths[0], *layout)
        self.out_conv = MPConv(width, img_channels, 3)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The layer of the noise level, before it is mixed with labels."""
        return TimeEmbedding(self.emb_noise, self.emb_noise.out_channels)

    @property
    def output_layer(self) -> nn.Module:
        """The last convolution, which is called with its gain."""
        return self.out_conv

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Noise level and labels in balance; there is no augmentation input."""
        emb = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None and labels is not None:
            unit = labels * math.sqrt(labels.shape[1])
            emb = mp_sum(emb, self.emb_label(unit), self.label_balance)
        return mp_silu(emb)

    def run_encoder(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """A channel of ones joins the input, in place of biases."""
        return super().run_encoder(torch.cat([x, torch.ones_like(x[:, :1])], 1), emb)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Concatenate features and skip, balanced in magnitude (`mp_cat`)."""
        return mp_cat(x, skip, self.concat_balance)

    def out(self, x: Tensor) -> Tensor:
        """F: the last convolution with its learned gain."""
        out: Tensor = self.out_conv(x, self.out_gain)
        return out


class Precond(Preconditioned):
    """The denoiser; as published, its body runs in float16 on an accelerator."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: Any,
    ) -> None:
        super().__init__()
        self.path = VE()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def body(self) -> EncoderFeatureUNet:
        """F, the U-Net."""
        return self.unet

    def scaling(self, sigma: Tensor) -> Scaling:
        """EDM's coefficients (`edm_scaling`) at sigma: (B,)."""
        return edm_scaling(sigma, self.sigma_data)

    def logvar(self, t: Tensor) -> Tensor:
        """u(sigma), the estimated log-variance of the loss: (B,) -> (B, 1, 1, 1)."""
        noise = self.scaling(t.reshape(-1)).noise
        out: Tensor = self.logvar_linear(self.logvar_fourier(noise))[:, :, None, None]
        return out
