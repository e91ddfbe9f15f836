"""Preconditioning: how a raw network becomes a denoiser of x_t = x_0 + sigma eps.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

(Karras et al. 2022, equation 7, https://arxiv.org/abs/2206.00364). The denoisers made of it are
called as (x_t, t, cond), as everywhere in fewstep, and have encoder features
(`fewstep.diffusion.encoder_features`). cond is None, labels (B,) of integers, where label = number
of classes means none, or (B, classes) one-hot rows, where zeros mean none. An unconditional
network ignores cond, one without augmentation input ignores augment_labels. Whatever the precision
of the network, the formula above is computed in float32 at least.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding
from fewstep.diffusion.heads import output_layer
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.types import Cond
from fewstep.nets.unet import EncoderFeatureUNet


class Scaling(NamedTuple):
    """The coefficients c_skip, c_out, c_in, each a number or (B,), and c_noise (B,)."""

    skip: Tensor | float
    out: Tensor
    into: Tensor | float
    noise: Tensor


def class_vectors(cond: Cond, x: Tensor, classes: int) -> Tensor | None:
    """Labels of any accepted form as one-hot rows (B, classes) of x's precision.

    None for an unconditional network. Raises ValueError for labels out of range (on a CPU; on
    other devices the check would stall, and the device reports them) or of another shape.
    """
    if classes == 0:
        return None
    if cond is None:
        return x.new_zeros(x.shape[0], classes)
    if not isinstance(cond, Tensor):
        raise ValueError(f"cond is None, labels or one-hot rows, got {type(cond).__name__}")
    if cond.ndim == 2 and cond.shape[1] == classes and cond.shape[0] in (1, x.shape[0]):
        return cond.to(x.dtype).expand(x.shape[0], classes)
    if cond.shape != (x.shape[0],) or cond.is_floating_point() or cond.is_complex():
        raise ValueError(
            f"cond has shape {tuple(cond.shape)} and type {cond.dtype}; expected integer labels "
            f"({len(x)},) or rows ({len(x)}, {classes})"
        )
    if cond.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = cond[(cond < 0) | (cond > classes)]
        if len(outside):
            raise ValueError(
                f"label {int(outside[0])} is outside 0 .. {classes} ({classes}: none)"
            )
    return F.one_hot(cond.long(), classes + 1)[:, :classes].to(x.dtype)


class Preconditioned(nn.Module, ABC):
    """A network body with its preconditioning: a `Denoiser` with encoder features."""

    path: NoisePath
    label_dim: int
    use_fp16: bool
    """Whether the body runs in float16 on an accelerator, as published; a CPU uses float32."""
    body_dtype: torch.dtype | None = None
    """The precision of the body on any device; None: as `use_fp16` says."""

    @property
    @abstractmethod
    def body(self) -> EncoderFeatureUNet:
        """The network body F."""

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F, h, w) of the features."""
        return self.body.feature_shape

    @property
    def time_embedding(self) -> TimeEmbedding:
        """Where the body embeds its noise level (`fewstep.diffusion.extra_inputs`)."""
        return self.body.time_embedding

    @property
    def output_layer(self) -> nn.Module:
        """The body's last layer (`fewstep.diffusion.heads`)."""
        return output_layer(self.body)

    def several(self, count: int, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The x_0 of each of `count` batches of F that one pass returns: (count, B, C, H, W)."""
        x, scale, inputs = self._prepare(xt, t, cond, None, False)
        outs = self.body(*inputs).chunk(count)
        return torch.stack([self._denoised(x, scale, out) for out in outs])

    @abstractmethod
    def scaling(self, sigma: Tensor) -> Scaling:
        """The four coefficients at sigma: (B,)."""

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Cond = None,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Tensor:
        """E[x_0 | x_t]: xt (B, C, H, W), t (B,) or () -> (B, C, H, W), float32 or float64."""
        x, scale, inputs = self._prepare(xt, t, cond, augment_labels, force_fp32)
        return self._denoised(x, scale, self.body(*inputs))

    def encode(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Cond = None,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> Tensor:
        """The body's features of x_t: (B, F, h, w), float32 or float64; no decoder is run."""
        x, _, inputs = self._prepare(xt, t, cond, augment_labels, force_fp32)
        return self.body.encode(*inputs).to(x.dtype)

    def forward_with_features(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Cond = None,
        augment_labels: Tensor | None = None,
        force_fp32: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(forward(...), encode(...)) from one pass."""
        x, scale, inputs = self._prepare(xt, t, cond, augment_labels, force_fp32)
        out, features = self.body.forward_with_features(*inputs)
        return self._denoised(x, scale, out), features.to(x.dtype)

    def _prepare(
        self, xt: Tensor, t: Tensor, cond: Cond, augment: Tensor | None, force: bool
    ) -> tuple[Tensor, Scaling, tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """x_t in working precision, the coefficients, and what the body is called with."""
        x = xt.to(torch.promote_types(xt.dtype, torch.float32))
        expand(t, x)  # refuses a t that does not fit
        scale = self.scaling(t.to(x.dtype).expand(x.shape[0]))
        labels = class_vectors(cond, x, self.label_dim)
        augment = None if augment is None else augment.to(x.dtype)
        into = (_column(scale.into) * x).to(self._dtype(x, force))
        return x, scale, (into, scale.noise, labels, augment)

    def _denoised(self, x: Tensor, scale: Scaling, out: Tensor) -> Tensor:
        """c_skip x + c_out F, of as many channels as x has."""
        out = out[:, : x.shape[1]].to(x.dtype)
        return _column(scale.skip) * x + _column(scale.out) * out

    def _dtype(self, x: Tensor, force: bool) -> torch.dtype:
        if force:
            return x.dtype
        if self.body_dtype is not None:
            return self.body_dtype
        return torch.float16 if self.use_fp16 and x.device.type != "cpu" else x.dtype


def _column(c: Tensor | float) -> Tensor | float:
    return c[:, None, None, None] if isinstance(c, Tensor) else c


def edm_scaling(sigma: Tensor, sigma_data: float) -> Scaling:
    """EDM's coefficients at sigma: (B,) (Karras et al. 2022, table 1).

    The network's input and target have unit variance for data of standard deviation sigma_data.
    """
    variance = sigma**2 + sigma_data**2
    norm = variance.sqrt()
    return Scaling(sigma_data**2 / variance, sigma * sigma_data / norm, 1 / norm, sigma.log() / 4)
