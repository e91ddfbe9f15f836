"""Align Your Steps (Sabour et al. 2024), https://arxiv.org/abs/2404.14507, by dynamic programming.

At which few times should a teacher be called? A step from noise level u to t (l = sigma / alpha)
that holds the prediction fixed follows another stochastic process than the true one; between their
paths the KL divergence is

    KL(u -> t) = int_t^u E |f(x_s) - f(x_u)|^2 s^-3 ds = int_t^u (m(u) - m(s)) s^-3 ds,

m(s) = E |x_0 - f(x_s)|^2 being the teacher's error of denoising data, since posterior means are a
martingale in s. It is a sum over steps, and their sum bounds the divergence of what comes out. So
m is measured once on data, and the best K steps among N levels are found exactly, by the shortest
path of K edges. The paper optimises the times themselves, by Monte Carlo of the same bound.

Nothing is trained. A step of the run measures m on a batch; what is shipped is the teacher with
its sampler at the times found. Of a guided teacher (kappa) m is that of the guided prediction,
which is no posterior mean, and the bound is no more than a guess. With few steps little is spent
on high noise, where m hardly changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG, AtScale
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VP, NoisePath, perturb
from fewstep.diffusion.samplers import MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.method import (
    Loss,
    Method,
    Nets,
    Product,
    Step,
    Turn,
    need_data,
    need_draws,
    need_network,
)
from fewstep.losses.score import denoising

CAP = 80.0
"""The largest noise level that is told apart from pure noise."""


class Errors(nn.Module):
    """Sums of the teacher's error at N times, and of samples: `sums` (N,), `count` (), buffers."""

    def __init__(self, rungs: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.count: Tensor
        self.register_buffer("sums", torch.zeros(rungs))
        self.register_buffer("count", torch.zeros(()))


def step_costs(levels: Tensor, errors: Tensor) -> Tensor:
    """c_ij = int_(l_j)^(l_i) (m_i - m(s)) s^-3 ds for i < j, by the trapezoid rule in ln s.

    levels, errors: (N,), decreasing levels l and m at them. Returns (N, N), infinite for i >= j.
    """
    inner = (errors[:, None] - errors).clamp(min=0) / levels**2
    pieces = (inner[:, :-1] + inner[:, 1:]) / 2 * (levels[:-1] / levels[1:]).log()
    pieces = pieces.triu()
    whole = torch.cat([pieces.new_zeros(len(levels), 1), pieces.cumsum(1)], 1)
    return torch.where(torch.ones_like(whole).triu(1) > 0, whole, torch.inf)


def shortest(costs: Tensor, steps: int) -> list[int]:
    """The path 0 = n_0 < ... < n_steps = N - 1 of least cost, with exactly that many steps."""
    value = torch.full_like(costs[0], torch.inf)
    value[0] = 0
    parents = []
    for _ in range(steps):
        value, parent = (value[:, None] + costs).min(0)
        parents.append(parent)
    path = [len(costs) - 1]
    for parent in reversed(parents):
        path.append(int(parent[path[-1]]))
    return path[::-1]


@dataclass(frozen=True)
class AlignYourSteps(Method):
    """The best times for a teacher's sampler by its error of denoising; nothing is trained.

    It needs a teacher that is a network, and data. ValueError for sizes out of range. Sabour et
    al. 2024, https://arxiv.org/abs/2404.14507.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = LinearSolver(6, order=2)
    """A `LinearSolver` or `MultiStep`: whose number of steps and first time stay."""
    rungs: int = 64
    """N, the noise levels that are chosen from, even in their logarithm."""
    low: float = 0.2
    """The noise level sigma / alpha at which the last step ends, in the bound; the call before it
    gives the sample. Smaller values draw the calls to low noise."""
    batches: int = 8
    """Steps of the run, each of which measures on a batch."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = isinstance(self.sampler, LinearSolver) and not self.sampler.a
        if not (plain or isinstance(self.sampler, MultiStep)):
            raise ValueError(
                "AlignYourSteps.sampler is a MultiStep, or a LinearSolver without numbers of its "
                f"own, got {self.sampler}"
            )
        if self.rungs <= self.sampler.calls or self.batches < 1 or self.low <= 0:
            raise ValueError(
                f"AlignYourSteps needs more rungs than the {self.sampler.calls} steps, 1 batch or "
                f"more and low above 0; got {self.rungs}, {self.batches} and {self.low:g}"
            )

    @property
    def length(self) -> int:
        """The number of batches."""
        return self.batches

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """A "student" that is the measurement alone.

        ValueError where the teacher is no network, or there are fewer times than steps.
        """
        known: Any = need_network(self, teacher)
        rungs = len(self.ladder(known.path))
        if rungs <= self.sampler.calls:
            raise ValueError(
                f"there are {rungs} times to choose from on {known.path}, not more than the "
                f"{self.sampler.calls} steps of {self.sampler}"
            )
        return Nets({"student": Errors(rungs).to(device_of(net))})

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, which measures."""
        return (Turn("student", self.measure),)

    def after_step(self, step: Step) -> None:
        """Add the errors of the step's samples."""
        if "errors" in step.sums:
            errors: Any = step.nets["student"]
            errors.sums += step.sums["errors"].to(errors.sums)
            errors.count += step.sums["count"].to(errors.count)
            step.restart("student")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The teacher, sampled at the times found; before the first step at its own."""
        net: Any = need_network(self, teacher)
        errors: Any = average
        sampler: Any = self.sampler
        if not errors.count.is_meta and bool(errors.count > 0):
            times = self.schedule(net.path, (errors.sums / errors.count).double())
            if isinstance(sampler, LinearSolver):
                sampler = replace(sampler, times=times)
            else:
                sampler = replace(sampler, times=Discrete(times[::-1]))
        return Product(net, sampler if self.kappa == 1 else CFG(sampler, self.kappa))

    def schedule(self, path: NoisePath, errors: Tensor) -> tuple[float, ...]:
        """The K times of the calls for m at all times, (N,); the last step leads to the last."""
        times = torch.tensor(self.ladder(path), dtype=torch.float64)
        levels = (path.sigma(times) / path.alpha(times)).clamp(max=CAP)
        rising = errors.cpu().flip(0).cummax(0).values.flip(0)  # as it is without noise
        chosen = shortest(step_costs(levels, rising), self.sampler.calls)[:-1]
        return tuple(float(times[n]) for n in chosen)

    def ladder(self, path: NoisePath) -> list[float]:
        """The times to choose from, decreasing, the first one that of the sampler."""
        if isinstance(self.sampler, LinearSolver):
            top = self.sampler.ladder(path)[0]
        else:
            assert isinstance(self.sampler, MultiStep)
            top = float(self.sampler.grid(torch.empty(0, dtype=torch.float64))[0])
        first = torch.tensor(top, dtype=torch.float64)
        high = float((path.sigma(first) / path.alpha(first)).clamp(max=CAP).log())
        levels = torch.linspace(high, math.log(self.low), self.rungs, dtype=torch.float64).exp()
        times = path.time_of(levels / (1 + levels))
        if isinstance(path, VP):
            times = times.round()
        inner = sorted({t for t in times[1:].tolist() if t < top}, reverse=True)
        return [top, *inner]

    @torch.no_grad()
    def measure(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """|x_0 - f(x_t, t)|^2, the mean over dimensions, of the batch at all times.

        Args:
            nets: not used.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws; a sample has the same noise at all times.

        Returns: no total; logs "error", the mean over times; sums "errors" (N,) and "count" ().

        Raises ValueError where the batch has no data or draws.
        """
        x0, draws = need_data(self, batch), need_draws(batch)
        eps = draws.normal("eps", x0.shape[1:]).to(x0)
        net, found = AtScale(teacher, self.kappa), []
        for time in self.ladder(teacher.path):
            t = x0.new_full((len(x0),), time)
            prediction = net(perturb(teacher.path, x0, eps, t), t, batch.cond)
            found.append(denoising(prediction, x0).sum())
        errors = torch.stack(found)
        count = errors.new_full((), float(len(x0)))
        mean = errors.mean() / len(x0)
        return Loss(None, {"error": mean}, {"errors": errors, "count": count})
