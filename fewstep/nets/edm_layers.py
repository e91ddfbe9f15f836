"""The building blocks of the DDPM++, NCSN++ and ADM networks.

A block takes features h and an embedding e of noise level and labels, and returns

    h' = s (skip(h) + conv1(silu(modulate(norm1(conv0(silu(norm0(h)))), e)))),

with s = sqrt(1/2) in the DDPM++ family (Song et al. 2021, appendix H,
https://arxiv.org/abs/2011.13456) and s = 1 in ADM. The embedding is added before the second
normalisation there, and scales and shifts its result here (Dhariwal & Nichol 2021, section 3,
https://arxiv.org/abs/2105.05233). Self-attention may follow, with the same s. Karras et al. 2022
(https://arxiv.org/abs/2206.00364, table 7) put both families side by side; names and shapes of
all parameters are those of their published weights.

Every layer computes in the precision of the features it is given: parameters are kept in float32
and cast on use, so that one network serves float16, bfloat16, float32 and float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.nets.attention import attend, split_heads


@dataclass(frozen=True)
class Init:
    """How weights start: uniform or normal, of variance gain^2 * 2/(in + out) or gain^2 / in."""

    scheme: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]
    gain: float = 1.0
    bias: float = 0.0
    """The gain of the biases, which start with the weights' law."""

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fill weight: (out, in, ...) and bias: (out,) in place."""
        fan_in = weight[0].numel()
        fan_out = weight.shape[0] * weight[0, 0].numel()
        fan = (fan_in + fan_out) / 2 if self.scheme == "xavier_uniform" else fan_in
        for tensor, gain in ((weight, self.gain), (bias, self.bias)):
            if tensor is None:
                continue
            if self.scheme == "kaiming_normal":
                tensor.normal_().mul_(gain / math.sqrt(fan))
            else:
                tensor.uniform_(-1, 1).mul_(gain * math.sqrt(3 / fan))


class Linear(nn.Linear):
    """A linear layer in the precision of its input: (B, in) -> (B, out)."""

    def __init__(self, inputs: int, outputs: int, init: Init, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        init.fill(self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Does nothing: `Init` fills the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out), with weights converted to the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def filter_2d(taps: Sequence[float]) -> Tensor:
    """The separable low-pass filter of a resampling layer, of sum one: (1, 1, n, n)."""
    f = torch.tensor(taps, dtype=torch.float32, device="cpu")
    outer = torch.outer(f, f)
    return (outer / outer.sum())[None, None].to(torch.get_default_device())


def downsample(x: Tensor, f: Tensor, pad: int | None = None) -> Tensor:
    """Filter and keep every second pixel: (B, C, 2 h, 2 w) -> (B, C, h, w) with the default pad.

    f is as `filter_2d` returns it. A depthwise convolution was measured to be faster than pooling.
    """
    pad = (f.shape[-1] - 1) // 2 if pad is None else pad
    f = f.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return F.conv2d(x, f, groups=x.shape[1], stride=2, padding=pad)


def upsample(x: Tensor, f: Tensor) -> Tensor:
    """Spread every pixel with four times the filter f: (B, C, h, w) -> (B, C, 2 h, 2 w)."""
    pad = (f.shape[-1] - 1) // 2
    f = (4 * f).to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return F.conv_transpose2d(x, f, groups=x.shape[1], stride=2, padding=pad)


class Conv2d(nn.Module):
    """Optional resampling by two with a low-pass filter, then an optional odd convolution.

    Upsampling spreads each pixel with four times the filter; downsampling filters and keeps every
    second pixel; the convolution runs at the lower resolution. With `fused`, a downsampling
    layer convolves first, on a border padded for both, as NCSN++ does in its residual input
    pyramid. kernel = 0 leaves the resampling alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init | None = None,
        resample: Literal["keep", "up", "down"] = "keep",
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.resample = resample
        self.fused = fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            if init is not None:
                init.fill(self.weight, self.bias)
        self.resample_filter: Tensor | None
        self.register_buffer("resample_filter", None if resample == "keep" else filter_2d(taps))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, h, w) -> (B, out, h', w')."""
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        f = self.resample_filter
        if f is not None and self.fused:
            return downsample(self._convolve(x, pad + (f.shape[-1] - 1) // 2), f, 0)
        if f is not None:
            x = upsample(x, f) if self.resample == "up" else downsample(x, f)
        return self._convolve(x, pad)

    def _convolve(self, x: Tensor, pad: int) -> Tensor:
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), _cast(self.bias, x), padding=pad)


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least four channels."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        if self.groups < 1 or channels % self.groups:
            raise ValueError(
                f"{channels} channels do not split into min(32, channels // 4) groups"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape, with weights converted to the dtype of x."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.groups, weight, bias, self.eps)


def silu(fresh: Tensor) -> Tensor:
    """x sigmoid(x), in place where no gradient will need x, which nobody else may hold."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network have in common."""

    emb_channels: int
    dropout: float
    init: Init
    init_zero: Init
    """Start of the layers that end a residual branch."""
    init_attn: Init
    skip_scale: float = 1.0
    eps: float = 1e-5
    heads: int | None = None
    """Attention heads; None: one for every 64 channels, and no attention below 64."""
    taps: tuple[float, ...] = (1, 1)
    project: bool = False
    """Whether the skip path of a resampling block has weights even where channels agree."""
    adaptive_scale: bool = True
    """Whether the embedding scales and shifts, or is added."""


class UNetBlock(nn.Module):
    """A residual block, with optional resampling before and self-attention after."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        resample: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.style = style
        heads = out_channels // 64 if style.heads is None else style.heads
        self.heads = heads if attention else 0
        if self.heads and out_channels % self.heads:
            raise ValueError(f"{out_channels} channels do not split into {heads} attention heads")
        outs = out_channels
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, outs, 3, style.init, resample, style.taps)
        width = 2 * outs if style.adaptive_scale else outs
        self.affine = Linear(style.emb_channels, width, style.init)
        self.norm1 = GroupNorm(outs, style.eps)
        self.conv1 = Conv2d(outs, outs, 3, style.init_zero)
        self.skip: Conv2d | None = None
        if outs != in_channels or resample != "keep":
            kernel = 1 if style.project or outs != in_channels else 0
            self.skip = Conv2d(in_channels, outs, kernel, style.init, resample, style.taps)
        if self.heads:
            self.norm2 = GroupNorm(outs, style.eps)
            self.qkv = Conv2d(outs, 3 * outs, 1, style.init_attn)
            self.proj = Conv2d(outs, outs, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, in, h, w), emb: (B, E) -> (B, out, h', w')."""
        style = self.style
        h = self.conv0(silu(self.norm0(x)))
        mod = self.affine(emb)[:, :, None, None].to(h.dtype)
        if style.adaptive_scale:
            scale, shift = mod.chunk(2, 1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h.add_(mod))
        h = self.conv1(F.dropout(silu(h), style.dropout, self.training))
        h = self._join(h, x if self.skip is None else self.skip(x))
        if self.heads:
            seen = attend(split_heads(self.qkv(self.norm2(h)), self.heads), h)
            h = self._join(self.proj(seen), h)
        return h

    def _join(self, fresh: Tensor, x: Tensor) -> Tensor:
        """s (fresh + x), in place of `fresh`, a convolution's output that no gradient needs."""
        fresh = fresh.add_(x)
        return fresh if self.style.skip_scale == 1 else fresh.mul_(self.style.skip_scale)


class PositionalEmbedding(nn.Module):
    """cos and sin of the noise label at n/2 geometric frequencies from 1 to 1/10000.

    With `endpoint` the last frequency is 1/10000 exactly (DDPM++), else one short of it (ADM).
    """

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.count = channels // 2
        self.steps = self.count - int(endpoint)

    def forward(self, noise: Tensor) -> Tensor:
        """noise: (B,) -> (B, n), cosines first."""
        index = torch.arange(self.count, dtype=torch.float32, device=noise.device)
        frequencies = (1 / 10000) ** (index / self.steps)
        phase = noise[:, None] * frequencies.to(noise.dtype)
        return torch.cat([phase.cos(), phase.sin()], 1)


class FourierEmbedding(nn.Module):
    """cos and sin of the noise label at n/2 random frequencies, N(0, 16^2), fixed for ever."""

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", torch.randn(channels // 2).mul_(scale))

    def forward(self, noise: Tensor) -> Tensor:
        """noise: (B,) -> (B, n), cosines first."""
        phase = noise[:, None] * (2 * math.pi * self.freqs).to(noise.dtype)
        return torch.cat([phase.cos(), phase.sin()], 1)
