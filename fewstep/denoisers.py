"""Parameterisations, converted once at the edge.

A network F may have been trained to predict x_0 in EDM's mixed form, the noise eps, the angular
velocity v or the flow velocity. Each class below wraps such a network and is a `Denoiser`;
nothing else in the package asks what a network predicts. F is called as F(x, label, cond) with
label: (B,) from `path.label(t)`; all arithmetic outside F is done in x_t's own precision.
"""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.core import Cond
from fewstep.path import (
    NoisePath,
    coefficients,
    eps_to_x0,
    v_to_x0,
    velocity_to_x0,
)


class _Wrapped(nn.Module):
    """A network and the path it lives on."""

    def __init__(self, net: nn.Module, path: NoisePath) -> None:
        super().__init__()
        self.net = net
        self.path = path

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """F(x, label(t), cond), with t: () spread over the batch."""
        return self.net(x, self.path.label(t.expand(len(x))), cond)


class EDM(_Wrapped):
    """D(x_t) = c_skip x_t + c_out F(c_in x_t; label), Karras et al. 2022, equations 7 and 8.

    Written for any path (EDM's case is alpha = 1), with n^2 = alpha^2 sd^2 + sigma^2:
    c_in = 1/n, c_skip = alpha sd^2/n^2, c_out = sigma sd/n. Input and training target of F have
    unit variance when the data have standard deviation sd; finite at alpha = 0.
    """

    def __init__(self, net: nn.Module, path: NoisePath, sigma_data: float = 0.5) -> None:
        super().__init__(net, path)
        self.sigma_data = sigma_data

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        alpha, sigma = coefficients(self.path, xt, t)
        variance = alpha**2 * self.sigma_data**2 + sigma**2
        norm = variance.sqrt()
        out = self.predict(xt / norm, t, cond)
        return alpha * self.sigma_data**2 / variance * xt + sigma * self.sigma_data / norm * out


class Eps(_Wrapped):
    """x_0 = (x_t - sigma F) / alpha (Ho et al. 2020); not defined at alpha = 0."""

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return eps_to_x0(self.path, xt, self.predict(xt, t, cond), t)


class V(_Wrapped):
    """x_0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2) (Salimans & Ho 2022)."""

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return v_to_x0(self.path, xt, self.predict(xt, t, cond), t)


class Velocity(_Wrapped):
    """x_0 from F = dx_t/dt; x_t - t F for rectified flow (Lipman et al. 2022)."""

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return velocity_to_x0(self.path, xt, self.predict(xt, t, cond), t)
