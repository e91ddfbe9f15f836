"""Samplers: few-step rollouts for students, the probability-flow ODE for teachers.

A sampler is a frozen dataclass and a pure function of (denoiser, z, cond, draws). None of them
disables gradients: a method may train through a rollout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VP, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Cond, Denoiser, Sampler


@dataclass(frozen=True)
class FewStep(Sampler):
    """The student's rollout: x^(0) = 0; x^(k) = f(alpha x^(k-1) + sigma eps_k, t_k).

    Fields:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        noise: of the calls after the first: drawn anew ("fresh"), z again ("fixed"), or the noise
            that the last input and output imply ("ddim").
        rho: spacing of the times; 1 is even, larger values are closer near the data.
        unit: whether the first input is z itself, not sigma z; for VP paths.

    t_k = t_init (1 - (k - 1) / steps)^rho and eps_1 = z. One step is SiD's generator
    G(z) = f(sigma_init z; sigma_init), Zhou et al. 2024, https://arxiv.org/abs/2404.04057; several
    are few-step SiD, https://arxiv.org/abs/2505.12674.

    On a path of timesteps (VP) they are whole, ceil((t_init + 1) (1 - (k - 1) / steps)^rho) - 1,
    as networks and stock schedulers know them: from 999 in four steps 999, 749, 499, 249, which is
    DMD2's ladder (Yin et al. 2024, https://arxiv.org/abs/2405.14867).

    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    fresh noise is needed and `draws` is None.
    """

    t_init: float = 2.5
    steps: int = 1
    noise: Literal["fresh", "fixed", "ddim"] = "fresh"
    """The noise of later steps: drawn anew, z again, or the noise that x^(k-1) was found in."""
    rho: float = 1.0
    """How the times are spaced: evenly, or (rho > 1) more closely near the data."""
    unit: bool = False
    """Whether the first input is z itself, not sigma z, as stock schedulers of several steps have
    it (a path of timesteps only; elsewhere sigma is 1, or the path has no unit)."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.t_init <= 0 or self.rho <= 0:
            raise ValueError(f"FewStep needs steps >= 1, t_init > 0 and rho > 0, got {self}")
        if self.noise not in ("fresh", "fixed", "ddim"):
            raise ValueError(f"FewStep.noise is 'fresh', 'fixed' or 'ddim', got {self.noise!r}")

    @property
    def calls(self) -> int:
        """K, the number of steps."""
        return self.steps

    def ladder(self, path: NoisePath) -> list[float]:
        """The times t_1 > ... > t_K on this path; ValueError where they do not fit it."""
        parts = [(1 - k / self.steps) ** self.rho for k in range(self.steps)]
        whole = isinstance(path, VP)
        if self.t_init > path.t_max or (whole and (self.t_init % 1 or self.steps > self.t_init)):
            more = ", a whole one, and there are no more steps than timesteps below it"
            raise ValueError(
                f"{self} does not fit the times {path.t_min:g} to {path.t_max:g} of "
                f"{type(path).__name__}: t_init is one of them" + (more if whole else "")
            )
        if not whole:
            return [self.t_init * part for part in parts]
        return [float(math.ceil((self.t_init + 1) * part - 1e-6) - 1) for part in parts]

    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """x^(K): z (B, *) standard normal -> (B, *), with a gradient through all calls."""
        x, xt = torch.zeros_like(z), z
        for k in range(self.steps):
            xt, t = self._input(k, denoiser, z, x, xt, draws)
            x = denoiser(xt, t, cond)
        return x

    def part(
        self, k: int, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """x^(k), with a gradient through call k alone: z (B, *) standard normal -> (B, *).

        ValueError unless 1 <= k <= steps.
        """
        if not 1 <= k <= self.steps:
            raise ValueError(f"{self} has steps 1 to {self.steps}, got {k}")
        x, xt = torch.zeros_like(z), z
        with torch.no_grad():
            for call in range(k - 1):
                xt, t = self._input(call, denoiser, z, x, xt, draws)
                x = denoiser(xt, t, cond)
            xt, t = self._input(k - 1, denoiser, z, x, xt, draws)
        return denoiser(xt, t, cond)

    def _input(
        self, k: int, denoiser: Denoiser, z: Tensor, x: Tensor, xt: Tensor, draws: Draws | None
    ) -> tuple[Tensor, Tensor]:
        """The input of call k, counted from 0, and its time (B,).

        x and xt: output and input of the call before.
        """
        path, ladder = denoiser.path, self.ladder(denoiser.path)
        t = x.new_full((x.shape[0],), ladder[k])  # not len(x), which a traced graph would keep
        if k == 0:
            if self.unit and not isinstance(path, VP):
                raise ValueError(f"{self}: unit noise is for timesteps, not for {path}")
            return (z if self.unit else perturb(path, x, z, t)), t
        if self.noise == "ddim":
            return path.ddim(xt, x, torch.full_like(t, ladder[k - 1]), t), t
        if self.noise == "fresh":
            if draws is None:
                raise ValueError(f"{self} renoises with fresh noise: pass draws")
            z = draws.normal(f"eps{k}", x.shape[1:], x.dtype)
        return perturb(path, x, z, t), t


@dataclass(frozen=True)
class Heun(Sampler):
    """The probability-flow ODE by Heun's method, Karras et al. 2022, algorithm 1.

    Fields:
        times: `times.quantile` of an even grid gives the ladder t_1 > ... > t_n.
        steps: n, the number of times.
        order: 2 for Heun's method, 1 for DDIM (`NoisePath.ddim` between the times).

    Order 2 makes two calls between times and a last one that denoises from t_n: 2 steps - 1 in all
    (18 steps, 35 calls); order 1 makes `steps` calls. Flows are integrated in the noise level
    (`NoisePath.scale`), never in t itself, so that timesteps are as good as sigma.

    Raises ValueError for values out of range, and in a call where the ladder is not finite or ends
    at sigma = 0. https://arxiv.org/abs/2206.00364
    """

    times: TimeLaw = Karras()
    steps: int = 18
    order: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.order not in (1, 2):
            raise ValueError(f"Heun needs steps >= 1 and order 1 or 2, got {self}")

    @property
    def calls(self) -> int:
        """2 steps - 1 for order 2, `steps` for order 1."""
        return self.order * (self.steps - 1) + 1

    def grid(self, like: Tensor) -> Tensor:
        """The ladder of times: (steps,), decreasing, with dtype and device of `like`."""
        u = torch.linspace(1, 0, self.steps, dtype=torch.float64, device=like.device)
        return self.times.quantile(u).to(like)

    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """z (B, *) standard normal -> (B, *) samples x_0; `draws` is not used."""
        path, grid = denoiser.path, self.grid(z)
        if not (float(path.sigma(grid[-1])) > 0 and bool(grid.isfinite().all())):
            raise ValueError(
                f"the ladder of {self} must be finite and end where there is still noise; it runs "
                f"from t = {float(grid[0]):g} to {float(grid[-1]):g}, so raise the law's lower end"
            )
        x = perturb(path, torch.zeros_like(z), z, grid[0])
        for t, s in pairwise(grid):
            x0 = denoiser(x, t, cond)
            x = path.ddim(x, x0, t, s)
            if self.order == 2:
                x = path.heun(x, x0, denoiser(x, s, cond), t, s)
        return denoiser(x, grid[-1], cond)
