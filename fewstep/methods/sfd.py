"""Simple and fast distillation (Zhou et al. 2024), https://arxiv.org/abs/2409.19681.

Only the times that are sampled at are trained, and later calls mend the errors of earlier ones. On
the student's ladder t_1 > ... > t_K > 0 the teacher's solver, with M more times between any two,
goes from noise X_0 through X_1, ..., X_K, its states at the ends of the intervals, the last one
data. The student takes one deterministic step (`NoisePath.ddim`) from a state of its own,

    x_k = ddim(sg x_(k-1), g(sg x_(k-1), t_k), t_k, t_(k+1)),    x_0 = X_0,
    L_k = E d(x_k - X_k),

where no gradient reaches x_(k-1) (algorithm 1). It learns not the flow from where it is, but
the way back to the teacher's path: at the minimum of call k all errors before it are gone. There
is one update for each interval, in order, each on new noise; published is one noise for all K.

d is the mean absolute difference. The published solver is DPM-Solver++(3M) with M = 3; here it is
one of `MultiStep` or `Heun`. Left out are the analytical first step, the student that is told its
number of steps (SFD-v), and the second stage of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.losses.distance import Distance, SumOfAbsolutes, regression


@dataclass(frozen=True)
class SFD(Method):
    """Simple and fast distillation: K updates of a student of K calls.

    It needs a teacher and no data. ValueError for a sampler that is not deterministic, and for
    values out of range. Zhou et al. 2024, https://arxiv.org/abs/2409.19681.
    """

    sampler: Sampler = FewStep(t_init=2.5, steps=4, noise="ddim", rho=2.0)
    """A `FewStep` with noise "ddim"; its times, and those between, are spaced alike."""
    between: int = 3
    """M, the teacher's times between two of the student's."""
    solver: Literal["heun", "dpm++", "unipc"] = "dpm++"
    """How the teacher steps: `Heun`, or `MultiStep` of order 2 ("unipc": 3)."""
    distance: Distance = SumOfAbsolutes()
    """d, divided by the number of a sample's dimensions."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = self.sampler
        if not isinstance(sampler, FewStep) or sampler.noise != "ddim" or sampler.times:
            raise ValueError(
                f"SFD.sampler is a FewStep(t_init, steps, 'ddim', rho), got {self.sampler}"
            )
        if self.between < 0:
            raise ValueError(f"SFD.between is 0 or more, got {self.between}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student alone: a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student for each interval, from noise to data."""
        calls = range(1, self.sampler.calls + 1)
        return [Turn("student", partial(self.student_loss, k)) for k in calls]

    def student_loss(self, k: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """d of the student's state after call k from the teacher's.

        Args:
            k: the number of the call, from 1.
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: its z (B, *) and cond are used.

        Returns: the mean over the batch; logs "call_k", the same.

        Raises ValueError where the ladder does not fit the teacher's path, or guidance meets no
        conditions.
        """
        target = self.target(k, teacher, batch)
        made = self.state(k, nets, batch).xs
        total = regression(self.distance, made, target).mean()
        return Loss(total, {f"call_{k}": total.detach()})

    def state(self, k: int, nets: Nets, batch: Batch) -> State:
        """Call k of the student, with a gradient through it alone."""
        student: nn.Module = nets["student"]
        states = self.sampler.states(student, batch.z, batch.cond, batch.draws)  # type: ignore[arg-type]
        with torch.no_grad():
            for _ in range(k - 1):
                next(states)
        return next(states)

    @torch.no_grad()
    def target(self, k: int, teacher: Denoiser, batch: Batch) -> Tensor:
        """X_k, the teacher's state at the end of interval k: (B, *)."""
        solver = self.teacher_sampler(teacher.path)
        wanted, interval = k * (self.between + 1), 0
        found = batch.z
        for call, state in enumerate(solver.states(teacher, batch.z, batch.cond)):
            # The second call of Heun's method corrects the end of the same interval.
            interval += not (self.solver == "heun" and call % 2)
            if interval > wanted:
                break
            found = state.xs
        return found

    def teacher_sampler(self, path: NoisePath) -> Sampler:
        """The teacher's solver on the refined ladder."""
        assert isinstance(self.sampler, FewStep)
        steps = self.sampler.steps * (self.between + 1)
        ladder = replace(self.sampler, steps=steps).ladder(path)
        times = Discrete(tuple(reversed(ladder)))
        solver: Sampler
        if self.solver == "heun":
            solver = Heun(times, steps)
        else:
            solver = MultiStep(times, steps, self.solver, order=3 if self.solver == "unipc" else 2)
        return solver if self.kappa == 1 else CFG(solver, self.kappa)
