"""Parallel decoding distillation (Shaul et al. 2026), https://arxiv.org/abs/2607.26004.

Of N intervals of time the student says, in one call at a state X_n, the mean velocities of the
next ones, each by an output layer of its own on a shared trunk
(`fewstep.diffusion.parallel_decoding`). Its own answers say through which states it goes,

    X_k+1 = X_k - (tau_k - tau_k+1) u_k,    k = n, n + 1, ...,

and at one of these, without a gradient, the teacher is asked for the mean velocity of the interval
that follows, which is one step of a solver (equation 11):

    L = E |u_k - U_k(sg X_k)|^2,    X_n from the student's own calls, k even in the block.

U is the teacher's velocity at X_k (Euler) or half way (the midpoint rule, two calls). At the
minimum the student follows the solver's N steps in as many calls as one likes (proposition 1), and
nothing was differentiated but the student itself: no second time, no derivative in time, no
adversary.

The number of calls may be chosen when sampling: block starts n are multiples of N over the most
of `calls`, and k lies within N over the fewest (L_min and L_max of the paper). Published are 1 to
8 calls, with N = 128 (Euler) or 64 (midpoint) on ImageNet and twice that for text to image and
video, at shifted times. Published training without data carries one noise through all of its
blocks, an update at each; here each update has new noise, and the student's calls before its block
are made again. What is said of the paper was read in summaries of it, not in the paper itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.heads import Heads
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import expand, perturb, same_shape
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.losses.score import denoising


@dataclass(frozen=True)
class PDD(Method):
    """Parallel decoding distillation: one update of a student with a head for each interval.

    It needs a teacher whose network says its output layer (`fewstep.diffusion.heads`), and no
    data. ValueError for another sampler, and for calls that the intervals cannot be divided into.
    Shaul et al. 2026, https://arxiv.org/abs/2607.26004.
    """

    sampler: Sampler = ParallelDecoding(2.5, steps=2)
    """A `ParallelDecoding`; the intervals are its own."""
    calls: tuple[int, int] = (1, 4)
    """The fewest and most calls that the weights can be sampled in; the former divides the
    latter, and the sampler's number lies between."""
    order: Literal[1, 2] = 2
    """Order of the teacher's step across an interval: 1 is Euler's, 2 the midpoint rule."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, ParallelDecoding):
            raise ValueError(f"PDD.sampler is a ParallelDecoding, got {self.sampler}")
        fewest, most = self.calls
        count = self.sampler.intervals
        if (
            not 1 <= fewest <= self.sampler.steps <= most
            or most % fewest
            or most % self.sampler.steps
            or count % most
        ):
            raise ValueError(
                f"PDD.calls is the fewest and most calls, divisors of the {count} intervals, the "
                f"first and the sampler's {self.sampler.steps} of the second; got {self.calls}"
            )

    @property
    def finest(self) -> ParallelDecoding:
        """The sampler of the most calls."""
        assert isinstance(self.sampler, ParallelDecoding)
        return replace(self.sampler, steps=self.calls[1])

    def result(self, model: Model) -> Model:
        """`model` with a head for each interval."""
        return replace(model, heads=self.finest.intervals)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` whose output layer is repeated."""
        return Nets({"student": Heads(deepcopy(net), self.finest.intervals)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, at a block that is a pure function of the step."""
        block = int(Draws(torch.tensor([step])).integers("block", self.calls[1]))
        return (Turn("student", partial(self.student_loss, block)),)

    def student_loss(self, block: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of mean velocities in an interval that follows a block's start.

        Args:
            block: number of the block, from 0, of those of the most calls.
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: its z (B, *), cond and draws are used.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the intervals do not fit the teacher's path, the batch has no
        draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        n = block * self.finest.block
        xn, tn = self.start(n, student, batch)
        said = student.answers(xn, tn, batch.cond)
        k = n + need_draws(batch).integers("k", self.reach(n))
        x, tau = xn / self.size(teacher, tn, xn), self.taus(teacher, xn)
        states = self.states(said.detach(), x, tau, n, k)
        u = self.mean_velocity(teacher, states, tau, k, batch)
        own = said[k, torch.arange(len(k), device=k.device)]
        return Loss(denoising(own, x - tau[n] * u, tau[n] ** -2).mean())

    def reach(self, n: int) -> int:
        """How many intervals from n on the student answers for."""
        most = self.finest.intervals // self.calls[0]
        return min(most, self.finest.intervals - n)

    @torch.no_grad()
    def start(self, n: int, student: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """X_n that the student's own calls lead to, (B, *), and t_n, (B,)."""
        sampler, z = self.finest, batch.z
        times = sampler.times(student.path)
        xt = perturb(student.path, torch.zeros_like(z), z, z.new_full((len(z),), times[0]))
        for state in islice(sampler.states(student, z, batch.cond), n // sampler.block):
            xt = state.xs
        return xt, z.new_full((len(z),), times[n])

    def taus(self, teacher: Denoiser, like: Tensor) -> Tensor:
        """The flow times of the intervals' ends: (N + 1,)."""
        return constant(self.finest.flow_times(teacher.path), like)

    def size(self, teacher: Denoiser, t: Tensor, like: Tensor) -> Tensor:
        """alpha + sigma at t (B,), ready to broadcast."""
        return expand(teacher.path.alpha(t) + teacher.path.sigma(t), like)

    def states(self, said: Tensor, x: Tensor, tau: Tensor, n: int, k: Tensor) -> Tensor:
        """X_k (B, *), scaled, where the student's answers lead from X_n = x."""
        j = torch.arange(len(said), device=k.device)
        crossed = (j >= n) & (j < k[:, None])
        weights = torch.where(crossed, (tau[:-1] - tau[1:]) / tau[n], 0).to(x)
        return x - torch.einsum("bk,kb...->b...", weights, x - said)

    @torch.no_grad()
    def mean_velocity(
        self, teacher: Denoiser, x: Tensor, tau: Tensor, k: Tensor, batch: Batch
    ) -> Tensor:
        """U_k of the guided teacher at scaled states (B, *)."""
        now, then = tau[k], tau[k + 1]
        u = self.velocity(teacher, x, now, batch)
        if self.order == 1:
            return u
        half = (now + then) / 2
        return self.velocity(teacher, x - expand(now - half, x) * u, half, batch)

    def velocity(self, teacher: Denoiser, x: Tensor, tau: Tensor, batch: Batch) -> Tensor:
        """(x - f) / tau of the guided teacher at scaled states (B, *) and flow times (B,)."""
        t = teacher.path.time_of(tau)
        xt = self.size(teacher, t, x) * x
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        same_shape(states=x, x0=f)
        return (x - f) / expand(tau, x)
