"""What a student's calls are given where that is noised data, in place of its own states.

At inference call k of a student of several calls is given what the calls before it made
(`fewstep.distillation.fake_score.Rollout`). The adversarial methods ADD, LADD and Flash Diffusion
give it noised data of the same time, which is what it would be given by perfect calls before it:

    x_t = alpha_t x_0 + sigma_t z,    but at the first time t_1    x_t = sigma_{t_1} z,

the sampler's own start, which knows nothing of a picture. Without this exception the student would
find in its first input what is left of x_0 there, and miss it when it is sampled (Sauer et al.
2023, https://arxiv.org/abs/2311.17042: a path whose last alpha is zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.constants import beside, constant
from fewstep.diffusion.noise_path import NoisePath, expand, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Cond, Sampler


class _Start:
    """A denoiser that is called for the sake of its input."""

    def __init__(self, path: NoisePath) -> None:
        self.path = path

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return xt


def require_few_steps(method: object, sampler: Sampler) -> FewStep:
    """`sampler`; ValueError for another than `FewStep`, whose calls denoise noised data."""
    if not isinstance(sampler, FewStep):
        name = type(method).__name__
        raise ValueError(
            f"{name}.sampler is a FewStep, as its calls are trained on noised data; got {sampler}"
        )
    return sampler


def require_trajectory(method: object, sampler: Sampler) -> FewStep:
    """`sampler`; ValueError for another than a `FewStep` whose states make a trajectory."""
    if not isinstance(sampler, FewStep) or sampler.noise != "ddim":
        name = type(method).__name__
        raise ValueError(f"{name}.sampler is a FewStep(noise='ddim'), got {sampler}")
    return sampler


def require_shares(method: object, name: str, shares: tuple[float, ...], calls: int) -> None:
    """ValueError unless `shares` is empty, or has one for each call and they add up to one."""
    wrong = len(shares) != calls or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6
    if shares and wrong:
        raise ValueError(
            f"{type(method).__name__}.{name} has a share of each of the sampler's {calls} calls, "
            f"and they add up to 1; got {shares}"
        )


def call_times(
    sampler: FewStep, path: NoisePath, shares: tuple[float, ...], draws: Draws, like: Tensor
) -> Tensor:
    """Times of random calls, (B,), with dtype and device of `like`.

    shares: how often each call comes, the noisiest first; (): all alike. The draw "call" is used.
    ValueError where the sampler's times do not fit the path.
    """
    ladder = constant(sampler.ladder(path), like)
    parts = torch.tensor(
        shares or (1 / len(ladder),) * len(ladder), dtype=torch.float64, device="cpu"
    )
    u = draws.uniform("call").double()
    below = beside(parts.cumsum(0)[:-1], u) <= u[:, None]
    return ladder[below.sum(1)]


def first_state(sampler: Sampler, path: NoisePath, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the first call of a sampler is given: x_t (B, *) made of z alone, and its time (B,)."""
    start = sampler.state(1, _Start(path), z)
    return start.xt, start.t


def call_input(sampler: FewStep, path: NoisePath, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t of data x_0 with the noise z, both (B, *), and the sampler's start where t is t_1.

    t: (B,), times of the sampler's ladder, or between them. Returns (B, *).
    """
    start, first = first_state(sampler, path, z)
    return torch.where(expand(t.to(first) >= first, z), start, perturb(path, x0, z, t))
