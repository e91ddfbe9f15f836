"""The flow of an exact teacher, solved: a flow map where there is no closed form.

Runge-Kutta's fourth order in flow time tau, where y = x_t / (alpha + sigma) has the velocity
v = (y - f) / tau. It is differentiable in all of its inputs, on paths whose `time_of` is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import coefficients, expand
from fewstep.diffusion.types import Cond


class SolvedFlowMap(nn.Module):
    """g(x_t, t, s) with which `path.ddim(x_t, g, t, s)` is where the flow from x_t is at s.

    On VE and Flow. teacher: an exact denoiser in float64; steps: of the solver.
    """

    input_names = ("s",)

    def __init__(self, teacher: Any, steps: int = 60) -> None:
        super().__init__()
        self.teacher, self.path, self.steps = teacher, teacher.path, steps

    def velocity(self, y: Tensor, tau: Tensor) -> Tensor:
        """v at y (B, D) and tau (B,)."""
        t = self.path.time_of(tau)
        alpha, sigma = coefficients(self.path, y, t)
        out: Tensor = (y - self.teacher((alpha + sigma) * y, t)) / tau[:, None]
        return out

    def end(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """y at s: (B, D)."""
        alpha, sigma = coefficients(self.path, xt, t)
        y, tau, rho = xt / (alpha + sigma), self.path.flow_time(t), self.path.flow_time(s)
        h = (rho - tau) / self.steps
        wide = h[:, None]
        for k in range(self.steps):
            now = tau + k * h
            a = self.velocity(y, now)
            b = self.velocity(y + wide / 2 * a, now + h / 2)
            c = self.velocity(y + wide / 2 * b, now + h / 2)
            d = self.velocity(y + wide * c, now + h)
            y = y + wide / 6 * (a + 2 * b + 2 * c + d)
        return y

    def forward(
        self, xt: Tensor, t: Tensor, cond: Cond = None, *, s: Tensor | None = None
    ) -> Tensor:
        """xt: (B, D), t and s: (B,), s < t -> g: (B, D); without s, s = 0."""
        s = torch.full_like(t, self.path.t_min) if s is None else s
        alpha, sigma = coefficients(self.path, xt, t)
        y, tau, rho = (
            xt / (alpha + sigma),
            expand(self.path.flow_time(t), xt),
            expand(self.path.flow_time(s), xt),
        )
        out: Tensor = y - tau * (y - self.end(xt, t, s)) / (tau - rho)
        return out

    def jump(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X(x_t, t, s): (B, D)."""
        alpha, sigma = coefficients(self.path, xt, s)
        return (alpha + sigma) * self.end(xt, t, s)
