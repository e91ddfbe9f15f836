"""Flow maps that are known: a teacher's own steps on a ladder, and its flow, of any mixture.

Both answer as a student does, with the g of a jump X = A x_t + B g, and hold a parameter `shift`,
zero at first, that is added to g: what a loss says of it is its gradient at the known map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath, coefficients, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import solve
from tests.instances import TEACHERS
from tests.quadrature import F64

Ends = Callable[[Tensor], Tensor]


def scene(path: NoisePath, kind: str = "gaussian", count: int = 100) -> tuple[Any, Batch]:
    """An exact teacher and data of its own law."""
    teacher: Any = TEACHERS[kind](path)
    x0 = teacher.sample(count, torch.Generator().manual_seed(0)).to(F64)
    return teacher, Batch(x0, None, x0, Draws.range(0, count))


class KnownMap(nn.Module):
    """g of a jump that `carry` makes; s is told, or is `ends` of t. shift is added to g."""

    input_names = ("s",)

    def __init__(self, teacher: Any, ends: Ends | None = None) -> None:
        super().__init__()
        self.teacher, self.path, self.ends = teacher, teacher.path, ends
        self.shift = nn.Parameter(torch.zeros(2, dtype=F64))

    def carry(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        if s is None:
            assert self.ends is not None
            s = self.ends(t)
        path = self.path
        (a, sigma), (b, tau) = ((f.alpha(u), f.sigma(u)) for f, u in ((path, t), (path, s)))
        ratio = expand(tau / sigma, xt)
        gap = expand(b - a * (tau / sigma), xt)
        still = expand(t - s, xt) == 0
        g = (self.carry(xt, t, s) - ratio * xt) / torch.where(still, 1.0, gap)
        out: Tensor = torch.where(still, self.teacher(xt, t), g) + self.shift
        return out


class LadderMap(KnownMap):
    """The product of a teacher's steps between the times of a ladder, from t to s."""

    def __init__(
        self, teacher: Any, times: Sequence[float], order: int = 1, ends: Ends | None = None
    ) -> None:
        super().__init__(teacher, ends)
        self.times, self.order = torch.tensor(times, dtype=F64), order

    def carry(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """All samples take all steps; those outside [s, t] are undone."""
        for u, v in reversed(list(pairwise(self.times))):
            one = torch.ones_like(t)
            step = solve(self.teacher, xt, v * one, u * one, None, 1.0, self.order)
            within = (v <= t + 1e-9) & (u >= s - 1e-9)
            xt = torch.where(expand(within, xt), step, xt)
        return xt


class SolvedMap(KnownMap):
    """A teacher's flow from t to s, in `steps` Runge-Kutta steps, even in flow time."""

    def __init__(self, teacher: Any, steps: int, ends: Ends | None = None) -> None:
        super().__init__(teacher, ends)
        self.steps = steps

    def velocity(self, y: Tensor, tau: Tensor) -> Tensor:
        """dy/dtau of y = x / (alpha + sigma), whose flow is a rectified flow's on every path."""
        t = self.path.time_of(tau)
        scale = expand(self.path.alpha(t) + self.path.sigma(t), y)
        out: Tensor = (y - self.teacher(scale * y, t)) / expand(tau, y)
        return out

    def carry(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        path = self.path
        tau, rho = path.flow_time(t), path.flow_time(s)
        y = xt / expand(path.alpha(t) + path.sigma(t), xt)
        h = (rho - tau) / self.steps
        for k in range(self.steps):
            now, wide = tau + k * h, expand(h, y)
            first = self.velocity(y, now)
            middle = self.velocity(y + wide / 2 * first, now + h / 2)
            third = self.velocity(y + wide / 2 * middle, now + h / 2)
            last = self.velocity(y + wide * third, now + h)
            y = y + wide / 6 * (first + 2 * middle + 2 * third + last)
        return expand(path.alpha(s) + path.sigma(s), y) * y


class Point(KnownMap):
    """Data of one point: the flow is straight, and its denoiser is the point."""

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        return torch.tensor([0.7, -0.4], dtype=F64) + self.shift + 0 * xt


class Consistency(KnownMap):
    """mu + (lam / L_t)^power o along each axis: at power 1/2 where a Gaussian's flow ends."""

    def __init__(self, teacher: Any, power: float = 0.5) -> None:
        super().__init__(teacher)
        self.power = power

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        alpha, sigma = coefficients(self.path, xt, t)
        mu, lam, basis = (
            x[0] for x in (self.teacher.means, self.teacher.variances, self.teacher.basis)
        )
        gain = (lam / (alpha**2 * lam + sigma**2)) ** self.power
        out: Tensor = mu + ((xt - alpha * mu) @ basis * gain) @ basis.T + self.shift
        return out
