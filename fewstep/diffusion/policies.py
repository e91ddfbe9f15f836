"""Policies: what a network's one call says of the flow until its next (Chen et al. 2025).

In pi-Flow (https://arxiv.org/abs/2510.14974) a call at a state x_s, at the source time s, returns
no step but a function pi(x, t), a prediction of x_0 at every later state, which is integrated in
many substeps without the network. All is in flow time tau = sigma / (alpha + sigma) and for the
scaled states x / (alpha + sigma), where every path is the straight one:

    x_r = (r / tau) x_tau + (1 - r / tau) pi(x_tau, tau),    r < tau: one substep of Euler.

`DX` says x_0 itself at times between the source and the end of its segment, and interpolates.

`GMFlow` says what x_0 may be, a mixture of K Gaussians sum_k w_k N(m_k, v) for each pixel, all
channels together. Given x_s it is a posterior; at another state it is conditioned on what has been
seen since, by Bayes' rule with the ratio of the two likelihoods (appendix of the paper): with
a = (1 - tau) / tau,

    1 / v' = 1 / v + k,    m' = v' (m / v + b),    log w' = log w + |m'|^2 / 2 v' - |m|^2 / 2 v,
    k = a^2 - a_s^2,       b = a x / tau - a_s x_s / s,

and pi = sum_k w'_k m'_k. With as many components as the data has modes it is the teacher's own
denoiser at every state; with v = 0 it would freeze x_0, as the step of DDIM does.

Both are read from heads of a network (`fewstep.diffusion.heads`), whose predictions of x_0 become
grid values or means. Of a mixture there are 2 K + 1: the log weight of a component is the mean of
its second K over the channels, of which only differences count, and v = (exp(l) s)^2 with
l = log 0.05 + mean(g_last - g_first), the published start. So all start as one step of DDIM.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.heads import require_heads
from fewstep.diffusion.noise_path import NoisePath, expand, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import OnLadder
from fewstep.diffusion.types import Cond, Denoiser, State

LOG_SD = math.log(0.05)
"""l of a mixture at the start, as published."""


class Source(NamedTuple):
    """Where a policy starts, x (B, *) and tau (B, 1, ..., 1), and the tau where it ends."""

    x: Tensor
    tau: Tensor
    end: Tensor


Policy = Callable[[Tensor, Tensor], Tensor]
"""pi: x (B, *), tau (B, 1, ..., 1) -> the prediction of x_0, (B, *)."""


class PolicyKind(ABC):
    """How heads of a network are read as a policy."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """How many predictions of x_0 a policy is made of."""

    @abstractmethod
    def read(self, answers: Tensor, source: Source, dropped: Tensor | None = None) -> Policy:
        """The policy of `answers` (heads, B, *).

        dropped: (B, heads), components that are left out, if a policy has any.
        """


@dataclass(frozen=True)
class DX(PolicyKind):
    """x_0 at `points` times from the segment's source (the first head) to its end.

    They are even in flow time. ValueError for fewer than 2. Published: 10.
    """

    points: int = 10
    """Number of times that x_0 is predicted at, each by a head; 2 or more."""

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"DX.points is 2 or more, got {self.points}")

    @property
    def heads(self) -> int:
        """The points."""
        return self.points

    def read(self, answers: Tensor, source: Source, dropped: Tensor | None = None) -> Policy:
        """Linear between the points."""
        last = self.points - 1
        length = (source.tau - source.end).clamp(min=torch.finfo(answers.dtype).tiny)

        def pi(x: Tensor, tau: Tensor) -> Tensor:
            place = ((source.tau - tau) / length).clamp(0, 1) * last
            parts = [
                (1 - (place - k).abs()).clamp(min=0) * answer for k, answer in enumerate(answers)
            ]
            return torch.stack(parts).sum(0)

        return pi


@dataclass(frozen=True)
class GMFlow(PolicyKind):
    """A mixture of `components` Gaussians for each pixel, of one variance.

    Pixels are what the first dimension of a sample is the channels of; a vector is one pixel.
    ValueError for fewer than 1. Published: 8 (FLUX, Qwen) and 32 (ImageNet).
    """

    components: int = 8
    """Number of Gaussians of a pixel's mixture, 1 or more."""

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"GMFlow.components is 1 or more, got {self.components}")

    @property
    def heads(self) -> int:
        """Means, log weights, and one for the variance."""
        return 2 * self.components + 1

    def read(self, answers: Tensor, source: Source, dropped: Tensor | None = None) -> Policy:
        """The posterior mean."""
        means, weights = answers[: self.components], answers[self.components : -1]
        weights = weights.mean(2, keepdim=True)
        if dropped is not None:
            gone = dropped.T.reshape(*dropped.T.shape, *(1,) * (weights.ndim - 2))
            weights = weights.masked_fill(gone, -math.inf)
        spread = (answers[-1] - answers[0]).flatten(1).mean(1)
        v = ((LOG_SD + expand(spread, source.x)).exp() * source.tau) ** 2
        a_s = (1 - source.tau) / source.tau
        seen = a_s / source.tau * source.x

        def pi(x: Tensor, tau: Tensor) -> Tensor:
            a = (1 - tau) / tau
            k, b = (a - a_s) * (a + a_s), a / tau * x - seen
            left = 1 + v * k
            gain = (2 * means * b - k * means**2) / (2 * left)  # less what all have
            share = (weights + gain.sum(2, keepdim=True)).softmax(0)
            return (share * (means + v * b) / left).sum(0)

        return pi


def roll(pi: Policy, x: Tensor, tau: Tensor, end: Tensor, substeps: int) -> Tensor:
    """The state (B, *) at `end` after even substeps of Euler from x at tau > end.

    x: (B, *), scaled; tau and end: (B, 1, ..., 1).
    """
    for k in range(substeps):
        left, length = substeps - k, tau - end
        now = end + length * (left / substeps)
        then = end + length * ((left - 1) / substeps)
        x = x + (1 - then / now) * (pi(x, now) - x)
    return x


def scaled(path: NoisePath, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t / (alpha + sigma) and tau, (B, *) and (B, 1, ..., 1)."""
    t = expand(t, xt)
    return xt / (path.alpha(t) + path.sigma(t)), path.flow_time(t)


@dataclass(frozen=True)
class FollowPolicy(OnLadder):
    """Call the network for a policy, follow it to the next call: pi-Flow's sampler.

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        rho: spacing of their times; 1 is even, larger values are closer near the data (`FewStep`).
        policy: how the network's heads are read, as it was trained.
        substeps: Euler's steps along the policy between two calls; they call no network.

    The x_0 of a state is the one whose single step, `path.ddim`, leads where the policy does.
    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    the network has other heads.
    """

    policy: PolicyKind = GMFlow()
    substeps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.substeps < 1:
            raise ValueError(f"FollowPolicy.substeps is 1 or more, got {self.substeps}")

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal; `draws` is not used."""
        net: Any = denoiser
        path, ladder = net.path, [*self.ladder(net.path), 0.0]
        t = z.new_full((z.shape[0],), ladder[0])
        xt = perturb(path, torch.zeros_like(z), z, t)
        for k in range(1, self.steps + 1):
            s = z.new_full((z.shape[0],), ladder[k])
            source = self.source(path, xt, t, s)
            there = roll(
                self.read(net, xt, t, cond, source), *source[:2], source.end, self.substeps
            )
            left = source.end / source.tau
            x0 = (there - left * source.x) / (1 - left)
            state = State(path, t, s, xt, x0, _ddim if k < self.steps else _data)
            yield state
            t, xt = s, state.xs

    def source(self, path: NoisePath, xt: Tensor, t: Tensor, s: Tensor) -> Source:
        """A segment from x_t (B, *) to s (B,); where s = 0, to the data."""
        x, tau = scaled(path, xt, t)
        end = expand(torch.where(s > 0, path.flow_time(s), 0.0), xt)
        return Source(x, tau, end)

    def read(self, net: Any, xt: Tensor, t: Tensor, cond: Cond, source: Source) -> Policy:
        """The policy of the network at x_t."""
        return self.policy.read(answers(net, self.policy, xt, t, cond), source)


def answers(net: Any, policy: PolicyKind, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The predictions (heads, B, *) of a network that has as many as the policy needs.

    ValueError for another network.
    """
    require_heads(net, policy.heads, policy)
    if net.head_count is None:
        return torch.stack([net(xt, t, cond)] * policy.heads)
    out: Tensor = net.answers(xt, t, cond)
    return out


def _ddim(state: State) -> Tensor:
    return state.path.ddim(state.xt, state.x0, state.t, state.s)


def _data(state: State) -> Tensor:
    return state.x0
