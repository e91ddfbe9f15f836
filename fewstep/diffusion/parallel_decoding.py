"""Parallel decoding: one call for the velocities of many intervals of time (Shaul et al. 2026).

The way from noise to data is cut into N intervals, and a network with N heads
(`fewstep.diffusion.heads`) says, from a state X_n, the mean velocity u_k of each of the intervals
k = n, ..., n + L - 1 that are to be crossed before it is called again
(https://arxiv.org/abs/2607.26004, equation 5):

    X_k+1 = X_k - (tau_k - tau_k+1) u_k,    u_k = (X_n - g_k) / tau_n,

in flow time tau = sigma / (alpha + sigma), for states scaled by alpha + sigma, with g_k the x_0 of
head k at X_n, so that heads are those of a network of velocities on every path. All L steps are
one, `path.ddim` from t_n to t_(n+L), with the prediction

    sum_k c_k g_k,    c_k = (tau_k - tau_k+1) / (tau_n - tau_(n+L)),

a mixture of the output layers (the paper's layer fusion, equations 14 and 15). Any number of calls
that divides N samples one set of weights; no second time is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.heads import require_heads
from fewstep.diffusion.noise_path import NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State


@dataclass(frozen=True)
class ParallelDecoding(Sampler):
    """Cross `intervals` / `steps` intervals of time in each call of a network with heads.

    Attributes:
        t_init: t_0, the time of the first call, in units of the path.
        steps: the number of calls, which divides `intervals`.
        intervals: N, the heads of the network.
        rho: spacing of the times of all intervals, as of a `FewStep` of N steps; 1 is even, larger
            values are closer near the data.

    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    the network has other heads.
    """

    t_init: float
    steps: int = 1
    intervals: int = 16
    rho: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.t_init <= 0 or self.rho <= 0:
            raise ValueError(
                f"ParallelDecoding needs steps >= 1, t_init > 0 and rho > 0, got {self}"
            )
        if self.intervals < 1 or self.intervals % self.steps:
            raise ValueError(
                f"ParallelDecoding.intervals is a multiple of its steps, {self.steps}, got "
                f"{self.intervals}"
            )

    @property
    def calls(self) -> int:
        """The number of steps."""
        return self.steps

    @property
    def block(self) -> int:
        """L, the intervals of one call."""
        return self.intervals // self.steps

    def ladder(self, path: NoisePath) -> list[float]:
        """The times of the calls on this path; ValueError where they do not fit it."""
        return self.times(path)[:-1][:: self.block]

    def times(self, path: NoisePath) -> list[float]:
        """t_0 > ... > t_N = 0, the ends of all intervals."""
        return [*Jumps(self.t_init, self.intervals, self.rho).ladder(path), 0.0]

    def flow_times(self, path: NoisePath) -> list[float]:
        """tau of these; the last is 0, the data, on every path."""
        times = torch.tensor(self.times(path)[:-1], dtype=torch.float64)
        taus: list[float] = path.flow_time(times).tolist()
        return [*taus, 0.0]

    def mix(self, path: NoisePath, n: int) -> tuple[float, ...]:
        """c_k for the call at X_n, 0 for the heads before."""
        tau = self.flow_times(path)
        whole = tau[n] - tau[n + self.block]
        shares = [(tau[k] - tau[k + 1]) / whole for k in range(n, n + self.block)]
        return (*[0.0] * n, *shares)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """As many states as calls from z (B, *), standard normal; `draws` is not used."""
        net: Any = denoiser
        require_heads(net, self.intervals, self)
        times = self.times(net.path)
        xt = perturb(net.path, torch.zeros_like(z), z, z.new_full((z.shape[0],), times[0]))
        for n in range(0, self.intervals, self.block):
            t, s = (z.new_full((z.shape[0],), times[k]) for k in (n, n + self.block))
            x0 = net(xt, t, cond, mix=self.mix(net.path, n))
            last = n + self.block == self.intervals
            state = State(net.path, t, s, xt, x0, _data if last else _ddim)
            yield state
            xt = state.xs


def _ddim(state: State) -> Tensor:
    return state.path.ddim(state.xt, state.x0, state.t, state.s)


def _data(state: State) -> Tensor:
    return state.x0
