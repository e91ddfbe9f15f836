"""Parameterisations, converted once at the edge.

A network F may have been trained to predict x_0 in EDM's mixed form, the noise eps, the angular
velocity v or the flow velocity. Each class below wraps such a network and is a `Denoiser`;
nothing else in the package asks what a network predicts. F is called as F(x, label, cond) with
label: (B,) from `path.label(t)`; all arithmetic outside F is done in x_t's own precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import feature_shape, require_encoder_features
from fewstep.diffusion.extra_inputs import TimeEmbedding, time_embedding
from fewstep.diffusion.heads import output_layer
from fewstep.diffusion.noise_path import (
    NoisePath,
    coefficients,
    eps_to_x0,
    v_to_x0,
    velocity_to_x0,
)
from fewstep.diffusion.types import Cond


class _Wrapped(nn.Module, ABC):
    """A network F on a noise path, wrapped as a `Denoiser`.

    It returns the features of F's encoder if F has any (see
    `fewstep.diffusion.encoder_features`).
    """

    def __init__(self, net: nn.Module, path: NoisePath) -> None:
        super().__init__()
        self.net = net
        self.path = path

    def into(self, xt: Tensor, t: Tensor) -> Tensor:
        """The input that F is given for x_t: x_t itself, unless a subclass scales it."""
        return xt

    @abstractmethod
    def x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """E[x_0 | x_t] from F's output."""

    def inputs(self, xt: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
        """F's arguments: (x, label(t), cond), with t: () spread over the batch."""
        return self.into(xt, t), self.path.label(t.expand(xt.shape[0])), cond

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """E[x_0 | x_t]: xt (B, *), t (B,) or () -> (B, *)."""
        return self.x0(xt, t, self.net(*self.inputs(xt, t, cond)))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the features of one sample, without the batch.

        ValueError where F does not say it.
        """
        return feature_shape(self.net)

    @property
    def data_conditions(self) -> Mapping[str, tuple[int, ...]]:
        """Conditions that are part of data, such as pictures, by name with their shapes."""
        given: Mapping[str, tuple[int, ...]] = getattr(self.net, "data_conditions", {})
        return given

    @property
    def time_embedding(self) -> TimeEmbedding:
        """Where F embeds its time (`fewstep.diffusion.extra_inputs`)."""
        return time_embedding(self.net)

    @property
    def output_layer(self) -> nn.Module:
        """The layer whose result is F (`fewstep.diffusion.heads`)."""
        return output_layer(self.net)

    def several(self, count: int, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The x_0 of each of `count` batches of F that one pass returns: (count, B, *)."""
        outs = self.net(*self.inputs(xt, t, cond)).chunk(count)
        return torch.stack([self.x0(xt, t, out) for out in outs])

    def encode(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The features of F's encoder at x_t: (B, F, *); the decoder is not run."""
        return require_encoder_features(self.net).encode(*self.inputs(xt, t, cond))

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Cond = None
    ) -> tuple[Tensor, Tensor]:
        """(E[x_0 | x_t], features) from one pass."""
        out, features = require_encoder_features(self.net).forward_with_features(
            *self.inputs(xt, t, cond)
        )
        return self.x0(xt, t, out), features


class EDM(_Wrapped):
    """D(x_t) = c_skip x_t + c_out F(c_in x_t; label), Karras et al. 2022, equations 7 and 8.

    Written for any path (EDM's case is alpha = 1), with n^2 = alpha^2 sd^2 + sigma^2:
    c_in = 1/n, c_skip = alpha sd^2/n^2, c_out = sigma sd/n. Input and training target of F have
    unit variance when the data have standard deviation sd; finite at alpha = 0.
    """

    def __init__(self, net: nn.Module, path: NoisePath, sigma_data: float = 0.5) -> None:
        super().__init__(net, path)
        self.sigma_data = sigma_data

    def into(self, xt: Tensor, t: Tensor) -> Tensor:
        """c_in x_t: (B, *)."""
        alpha, sigma = coefficients(self.path, xt, t)
        return xt / (alpha**2 * self.sigma_data**2 + sigma**2).sqrt()

    def x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """c_skip x_t + c_out F: (B, *)."""
        alpha, sigma = coefficients(self.path, xt, t)
        variance = alpha**2 * self.sigma_data**2 + sigma**2
        skip = alpha * self.sigma_data**2 / variance
        return skip * xt + sigma * self.sigma_data / variance.sqrt() * out


class Eps(_Wrapped):
    """x_0 = (x_t - sigma F) / alpha (Ho et al. 2020); not defined at alpha = 0."""

    def x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """(x_t - sigma F) / alpha: (B, *)."""
        return eps_to_x0(self.path, xt, out, t)


class V(_Wrapped):
    """x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2) (Salimans & Ho 2022)."""

    def x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """(alpha x_t - sigma F) / (alpha^2 + sigma^2): (B, *)."""
        return v_to_x0(self.path, xt, out, t)


class Velocity(_Wrapped):
    """x_0 from F = dx_t/dt; x_t - t F for rectified flow (Lipman et al. 2022)."""

    def x0(self, xt: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """(sigma' x_t - sigma F) / (alpha sigma' - sigma alpha'): (B, *)."""
        return velocity_to_x0(self.path, xt, out, t)
