"""Sampling that begins small: each call at a resolution of its own, the last at that of samples.

Noise hides what is fine first, so that calls at high noise lose little on a smaller picture and
cost less (Starodubcev et al. 2025, https://arxiv.org/abs/2503.16397). A call at t_k makes x_k, at
a size f_k times smaller than the sample; it is enlarged and noised anew for the next,

    x_t = alpha_t up(x_k) + sigma_t eps,    t = t_(k + 1),

which must be noise enough to hide how it was enlarged. The network is one for all sizes.

All dimensions of a sample after the first, the channels, are resized; what has no others, such as
a vector, has one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.diffusion.noise_path import VP, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State

MODES = {3: "linear", 4: "bicubic", 5: "trilinear"}
"""How samples of so many dimensions, the batch among them, are enlarged."""


def reduced(x: Tensor, factor: int) -> Tensor:
    """The means of blocks: (B, C, *) -> (B, C, *), each size divided by `factor`.

    ValueError where it does not divide one.
    """
    for dim in range(2, x.ndim if factor > 1 else 2):
        if x.shape[dim] % factor:
            raise ValueError(
                f"a sample of {tuple(x.shape[1:])} has no {factor} times smaller one; take scales "
                "that divide its sizes"
            )
        x = x.unflatten(dim, (-1, factor)).mean(dim + 1)
    return x


def reduced_noise(z: Tensor, factor: int) -> Tensor:
    """Standard normal noise of the size of `reduced`, from such noise z (B, C, *)."""
    return reduced(z, factor) * float(factor ** ((z.ndim - 2) / 2))


def enlarged(x: Tensor, factor: int) -> Tensor:
    """Pictures `factor` times larger, by bicubic interpolation; signals and volumes by linear.

    x: (B, C, *) -> (B, C, *).
    """
    if factor == 1 or x.ndim < 3:
        return x
    out: Tensor = interpolate(x, scale_factor=factor, mode=MODES[x.ndim], align_corners=False)
    return out


@dataclass(frozen=True)
class ScaleWise(Sampler):
    """Calls at t_1 > ... > t_K, on samples f_1 >= ... >= f_K = 1 times smaller than the last.

    Attributes:
        times: t_1, ..., t_K, in units of the path.
        scales: f_1, ..., f_K; each is a multiple of the next.

    The first input is the noise of the smaller size that z has as the means of its blocks.
    ValueError for times and scales that do not fit each other or the path, and where noise is
    needed and `draws` is None. Starodubcev et al. 2025, https://arxiv.org/abs/2503.16397.
    """

    times: tuple[float, ...] = (2.5, 1.0)
    scales: tuple[int, ...] = (2, 1)

    def __post_init__(self) -> None:
        times, scales = self.times, self.scales
        if not times or list(times) != sorted(set(times), reverse=True) or times[-1] <= 0:
            raise ValueError(f"ScaleWise.times decrease to a positive one; got {times}")
        if len(scales) != len(times) or min(scales) < 1 or scales[-1] != 1:
            raise ValueError(
                f"ScaleWise.scales are as many as its times, and end with 1; got {scales} for "
                f"{times}"
            )
        if any(a % b for a, b in pairwise(scales)):
            raise ValueError(f"each of ScaleWise.scales is a multiple of the next; got {scales}")

    @property
    def calls(self) -> int:
        """K."""
        return len(self.times)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal and of the size of the samples."""
        path = denoiser.path
        if self.times[0] > path.t_max or (isinstance(path, VP) and any(t % 1 for t in self.times)):
            raise ValueError(
                f"{self} does not fit the times {path.t_min:g} to {path.t_max:g} of {path}"
            )
        ladder = [z.new_full((z.shape[0],), t) for t in (*self.times, 0.0)]
        noise = reduced_noise(z, self.scales[0])
        xt = perturb(path, torch.zeros_like(noise), noise, ladder[0])
        for k in range(1, self.calls + 1):
            x0 = denoiser(xt, ladder[k - 1], cond)
            step = partial(self._next, k, z, draws) if k < self.calls else _data
            state = State(path, ladder[k - 1], ladder[k], xt, x0, step)
            yield state
            xt = state.xs

    def _next(self, k: int, z: Tensor, draws: Draws | None, state: State) -> Tensor:
        """The input of call k, counted from 0."""
        if draws is None:
            raise ValueError(f"{self} renoises with fresh noise: pass draws")
        eps = draws.normal(f"eps{k}", z.shape[1:], z.dtype)
        return self.noised(k, state.path, state.x0, eps, state.s)

    def noised(self, k: int, path: NoisePath, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The input of call k, counted from 0, from an output x of the size of the call before.

        eps: (B, *), noise of the size of samples; t: (B,), the time of call k.
        """
        large = enlarged(x, self.scales[k - 1] // self.scales[k])
        return perturb(path, large, reduced_noise(eps, self.scales[k]), t)


def _data(state: State) -> Tensor:
    """x_0: where the last call leads."""
    return state.x0
