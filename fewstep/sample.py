"""Samplers: few-step rollouts for students, the probability-flow ODE for teachers.

A sampler is a frozen dataclass and a pure function of (denoiser, z, cond, draws). None of them
disables gradients: a method may train through a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core import Cond, Denoiser, Sampler
from fewstep.draws import Draws
from fewstep.path import expand, perturb, x0_to_velocity
from fewstep.times import Karras, TimeLaw


@dataclass(frozen=True)
class FewStep(Sampler):
    """The student's rollout: x^(0) = 0; x^(k) = f(alpha x^(k-1) + sigma eps_k, t_k).

    t_k = t_init (1 - (k - 1) / steps), eps_1 = z, later eps_k fresh. One step is SiD's
    generator G(z) = f(sigma_init z; sigma_init), Zhou et al. 2024,
    https://arxiv.org/abs/2404.04057; several are few-step SiD,
    https://arxiv.org/abs/2505.12674.
    """

    t_init: float = 2.5
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.t_init <= 0:
            raise ValueError(f"FewStep needs steps >= 1 and t_init > 0, got {self}")

    @property
    def calls(self) -> int:
        return self.steps

    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        if self.steps > 1 and draws is None:
            raise ValueError(f"{self} renoises with fresh noise: pass draws")
        x, eps = torch.zeros_like(z), z
        for k in range(self.steps):
            t = z.new_full((len(z),), self.t_init * (1 - k / self.steps))
            if k and draws is not None:
                eps = draws.normal(f"eps{k}", z.shape[1:], z.dtype)
            x = denoiser(perturb(denoiser.path, x, eps, t), t, cond)
        return x


@dataclass(frozen=True)
class Heun(Sampler):
    """The probability-flow ODE by Heun's method, Karras et al. 2022, algorithm 1.

    `times.quantile` of an even grid gives the ladder t_1 > ... > t_n; between rungs two calls,
    and one last call that denoises from t_n: 2 steps - 1 in all (18 steps, 35 calls).
    `order=1` is Euler, which is DDIM: `steps` calls.
    """

    times: TimeLaw = Karras()
    steps: int = 18
    order: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.order not in (1, 2):
            raise ValueError(f"Heun needs steps >= 1 and order 1 or 2, got {self}")

    @property
    def calls(self) -> int:
        return self.order * (self.steps - 1) + 1

    def grid(self, like: Tensor) -> Tensor:
        """The ladder: (steps,), decreasing."""
        u = torch.linspace(1, 0, self.steps, dtype=torch.float64, device=like.device)
        return self.times.quantile(u).to(like)

    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        path, grid = denoiser.path, self.grid(z)
        if not (float(path.sigma(grid[-1])) > 0 and bool(grid.isfinite().all())):
            raise ValueError(
                f"the ladder of {self} must be finite and end where there is still noise; it runs "
                f"from t = {float(grid[0]):g} to {float(grid[-1]):g}, so raise the law's lower end"
            )
        x = perturb(path, torch.zeros_like(z), z, grid[0])
        for t, s in pairwise(grid):
            step = expand(s - t, x)
            v = x0_to_velocity(path, x, denoiser(x, t, cond), t)
            proposal = x + step * v
            if self.order == 2:
                v = (v + x0_to_velocity(path, proposal, denoiser(proposal, s, cond), s)) / 2
                proposal = x + step * v
            x = proposal
        return denoiser(x, grid[-1], cond)
