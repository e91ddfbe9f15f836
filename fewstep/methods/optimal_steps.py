"""Optimal stepsizes (Pei et al. 2025), https://arxiv.org/abs/2503.21774.

Which few times of a teacher's long ladder should be visited? With X_j the teacher's own state at
time j of N, and x_j^(k) the state at j after k deterministic steps (`NoisePath.ddim`),

    x_j^(k) = the nearest to X_j  of  { step(x_i^(k-1), t_i -> t_j) : i < j },

a dynamic programme over i, from x_0^(0) = X_0, noise, to the data after K steps. It is greedy in
the state: only the nearest x_i^(k-1) is kept, as published. Paths have exactly K steps.

Nothing is trained. A step of the run finds the path of each of its samples and counts how often
each time is call k; the schedule is the median over all samples so far. What is shipped is the
teacher with that schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG, guided
from fewstep.diffusion.noise_path import VP, NoisePath, perturb
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.method import (
    Loss,
    Method,
    Nets,
    Product,
    Step,
    Turn,
    need_network,
)


class Schedule(nn.Module):
    """How often each of N times is call k of K: `votes` (K, N), a buffer."""

    def __init__(self, calls: int, rungs: int) -> None:
        super().__init__()
        self.votes: Tensor
        self.register_buffer("votes", torch.zeros(calls, rungs))

    def path(self) -> list[int]:
        """The K chosen times, numbers from 0: the lower medians of the votes; even without any."""
        calls, rungs = self.votes.shape
        if self.votes.is_meta or not bool(self.votes.sum() > 0):
            return [k * rungs // calls for k in range(calls)]
        share = self.votes.cumsum(1) / self.votes.sum(1, keepdim=True)
        return [int(n) for n in (share < 0.5 - 1e-6).sum(1)]


@dataclass(frozen=True)
class OptimalSteps(Method):
    """The best `calls` times of a teacher's ladder, by dynamic programming; nothing is trained.

    It needs a teacher that is a network, and no data. ValueError for sizes out of range. Pei et
    al. 2025, https://arxiv.org/abs/2503.21774.
    """

    sampler: Sampler = Heun(Karras(), steps=32, order=1)
    """The teacher's ladder, a `Heun` of order 1: its N times are what is chosen from (published:
    200). The search makes N + (K - 1) N calls."""
    calls: int = 4
    """K, the network calls of the schedule."""
    batches: int = 4
    """Steps of the run, each on new noise."""
    nearest: Literal["sample", "batch"] = "sample"
    """Whether each sample has a path of its own, or all of a (micro)batch share one."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    unit: bool = False
    """Whether the first input is z itself, as of `FewStep`: for teachers of timesteps whose own
    sampler has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, Heun) or self.sampler.order != 1:
            raise ValueError(
                f"OptimalSteps.sampler is a Heun of order 1, got {self.sampler}; its times are "
                "what is chosen from"
            )
        if not 1 <= self.calls <= self.sampler.steps or self.batches < 1:
            raise ValueError(
                f"OptimalSteps needs calls from 1 to the sampler's {self.sampler.steps} and "
                f"batches of 1 or more, got {self.calls} and {self.batches}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether all samples of a batch share a path."""
        return self.nearest == "batch"

    @property
    def length(self) -> int:
        """The number of batches."""
        return self.batches

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """A "student" that is the schedule alone.

        ValueError where the teacher is no network, which could not be shipped.
        """
        need_network(self, teacher)
        return Nets({"student": Schedule(self.calls, self.sampler.calls).to(device_of(net))})

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, which measures."""
        return (Turn("student", self.search),)

    def after_step(self, step: Step) -> None:
        """Count the votes of the step's samples."""
        if "votes" in step.sums:
            schedule: Any = step.nets["student"]
            schedule.votes += step.sums["votes"].to(schedule.votes)
            step.restart("student")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The teacher, sampled deterministically at the chosen times."""
        net: Any = need_network(self, teacher)
        schedule: Any = average
        path = net.path
        grid = self.ladder(path, torch.empty(0, dtype=torch.float64)).tolist()
        times = tuple(grid[n] for n in schedule.path())
        sampler = FewStep(noise="ddim", times=times, unit=self.unit)
        return Product(net, sampler if self.kappa == 1 else CFG(sampler, self.kappa))

    def ladder(self, path: NoisePath, like: Tensor) -> Tensor:
        """The times t_0 > ... > t_(N-1): (N,), whole on timesteps; dtype and device of `like`."""
        assert isinstance(self.sampler, Heun)
        grid = self.sampler.grid(like)
        return grid.round() if isinstance(path, VP) else grid

    @torch.no_grad()
    def search(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The path of each sample of the batch.

        Args:
            nets: not used.
            teacher: the teacher's denoiser.
            batch: its z (B, *) and cond are used.

        Returns: no total; logs "error", the mean square distance to the teacher's own samples;
        sums "votes", (K, N).
        """
        path = teacher.path
        grid, z = self.ladder(path, batch.z), batch.z

        def net(x: Tensor, t: Tensor) -> Tensor:
            return guided(teacher, x, t, batch.cond, [self.kappa]).predictions[0]

        count, n = len(z), len(grid)
        noise = z if self.unit else perturb(path, torch.zeros_like(z), z, grid[0])
        own = [noise]
        for j in range(n):
            x0 = net(own[j], grid[j])
            own.append(x0 if j + 1 == n else path.ddim(own[j], x0, grid[j], grid[j + 1]))
        far = torch.full((n + 1, count), torch.inf, dtype=z.dtype, device=z.device)
        states: dict[int, Tensor] = {0: noise}
        parents: list[Tensor] = []
        error = far[0]
        for _ in range(self.calls):
            best, parent = far.clone(), torch.full((n + 1, count), -1, device=z.device)
            found: dict[int, Tensor] = {}
            for i, x in states.items():
                if i == n:
                    continue
                x0 = net(x, grid[i])
                for j in range(i + 1, n + 1):
                    xj = x0 if j == n else path.ddim(x, x0, grid[i], grid[j])
                    apart = ((xj - own[j]) ** 2).flatten(1).mean(1)
                    if self.nearest == "batch":
                        apart = apart.mean().expand(count)
                    nearer = apart < best[j]
                    best[j] = torch.where(nearer, apart, best[j])
                    parent[j] = torch.where(nearer, i, parent[j])
                    mask = nearer.reshape(-1, *(1,) * (z.ndim - 1))
                    found[j] = torch.where(mask, xj, found.get(j, xj))
            states, error = found, best[n]
            parents.append(parent)
        votes = torch.zeros(self.calls, n, device=z.device)
        at = torch.full((count,), n, device=z.device)
        for k in reversed(range(self.calls)):
            at = parents[k].gather(0, at[None])[0]
            votes[k].index_add_(0, at, torch.ones(count, device=z.device))
        return Loss(None, {"error": error.mean()}, {"votes": votes})
