"""Shortcutting flow matching (Cai et al. 2025), https://arxiv.org/abs/2510.17858.

A shortcut model (Frans et al. 2024, https://arxiv.org/abs/2410.12557) is told the length of its
step, and learns that one step is two of half the length. Here the student is told no length, so
that any pretrained network can be one: its velocities should agree for all of them, which is to
make the flow straight. From noised data x_t at a time of a grid of K steps, with m and s the next
two times,

    x_m = ddim(x_t, f_1(x_t, t), t, m),    x_s = ddim(x_m, f_2(x_m, m), m, s),
    L = E |v(x_t, t) - v*|^2,    v* = ((t - m) v_1 + (m - s) v_2) / (t - s),

v* being the velocity of the one step from x_t to x_s. K changes from step to step. For the finest
grid f_1 is the teacher, guided by `kappa`, for the coarser ones a fast average of the student; f_2
is always a slow one. So what the teacher knows of short steps climbs to long ones. Velocities are
those of flow time, v = (y - g) / tau with tau = sigma / (alpha + sigma) and y = x / (alpha +
sigma), on any path; the grids are even in it but for a shift (Esser et al. 2024,
https://arxiv.org/abs/2403.03206, equation 23), which is drawn for each sample.

A student that is not told its step learns the mean of the targets of all steps that begin at t.
Where the flow is curved that is none of them: on a Gaussian N(0, 1/4), with mean velocities .98,
.96, .88 and .5 at t = 1 for steps of 1/8, 1/4, 1/2 and 1, one step makes a spread of .17 for .5.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import follow, jump, noised, one_jump, require_decay, start_of
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.losses.score import denoising


class Steps(NamedTuple):
    """Noised data x_t (B, *), its time t, and the next two of the grid, m and s, (B,) each."""

    xt: Tensor
    t: Tensor
    m: Tensor
    s: Tensor


@dataclass(frozen=True)
class SCFM(Method):
    """Shortcutting flow matching: one update of a student whose one step is two of half as long.

    It needs a teacher and data. ValueError for values out of range. Cai et al. 2025,
    https://arxiv.org/abs/2510.17858.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(2.5, 4, "ddim", 2.0)
    grids: tuple[int, ...] = (2, 4, 8, 16)
    """K of the grids on which the student teaches itself, each as often; 2 is one step in all."""
    teacher_steps: int = 32
    """K of the grid whose first step is the teacher's."""
    teacher_share: float = 0.4
    """Share of the training steps that are on this grid."""
    shift: tuple[float, float] = (1.0, 2.0)
    """The least and largest shift of a grid to noise (published: 2.5 to 4.5, for FLUX)."""
    fast: float = 0.9
    """What the first step's fast average keeps of itself in a training step (published: 0.99)."""
    slow: float = 0.99
    """What the second step's slow average keeps of itself in a training step (published:
    0.999)."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for decay in (self.fast, self.slow):
            require_decay(self, decay)
        if not self.grids or min(*self.grids, self.teacher_steps) < 2:
            raise ValueError(
                "SCFM's grids have two steps or more, and there is one at least; got "
                f"{self.grids} and teacher_steps {self.teacher_steps}"
            )
        if not 0 < self.teacher_share <= 1:
            raise ValueError(
                f"SCFM.teacher_share is above 0 and at most 1, got {self.teacher_share:g}"
            )
        if not 0 < self.shift[0] <= self.shift[1]:
            raise ValueError(f"SCFM.shift is two positive numbers in order, got {self.shift}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and its averages."""
        return Nets({name: deepcopy(net) for name in ("student", "fast", "slow")})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on the step's grid."""
        return (Turn("student", partial(self.student_loss, self.grid(step))),)

    def grid(self, step: int) -> int:
        """K of a step: the teacher's for its share of them, else one of `grids`."""
        draws = Draws(torch.tensor([step]))
        if float(draws.uniform("teacher")) < self.teacher_share:
            return self.teacher_steps
        return self.grids[int(draws.integers("grid", len(self.grids)))]

    def after_step(self, step: Step) -> None:
        """The averages follow the student."""
        follow(step, self.fast, "fast")
        follow(step, self.slow, "slow")

    def student_loss(self, count: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The regression of the student's velocity on that of two steps.

        Args:
            count: K of the grid.
            nets: the "student", and its averages "fast" and "slow".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        path: NoisePath = student.path
        at = self.steps(count, path, batch)
        target = self.target(count, nets, teacher, at, batch)
        prediction = student(at.xt, at.t, batch.cond)
        tau = expand(path.flow_time(at.t), at.xt)
        return Loss(denoising(prediction, target, tau**-2).mean())

    def steps(self, count: int, path: NoisePath, batch: Batch) -> Steps:
        """Noised data at a random time of a grid of `count` steps that has two more below it."""
        x0, draws = need_data(self, batch), need_draws(batch)
        i = draws.integers("t", count - 1)
        low, high = self.shift
        shift = low + (high - low) * draws.uniform("shift").to(x0)
        start = path.flow_time(x0.new_full((), start_of(self.sampler, path)))
        shares = [1 - (i + k).to(x0) / count for k in range(3)]
        t, m, s = (
            path.time_of(start * shift * share / (1 + (shift - 1) * share)) for share in shares
        )
        return Steps(noised(path, x0, t, draws), t, m, s)

    @torch.no_grad()
    def target(self, count: int, nets: Nets, teacher: Denoiser, at: Steps, batch: Batch) -> Tensor:
        """The prediction of x_0 whose one step ends where two do: (B, *)."""
        path, cond = teacher.path, batch.cond
        if count == self.teacher_steps:
            first = guided(teacher, at.xt, at.t, cond, [self.kappa]).predictions[0]
            xm = path.ddim(at.xt, first, at.t, at.m)
        else:
            xm = jump(nets["fast"], at.xt, at.t, at.m, cond)
        xs = jump(nets["slow"], xm, at.m, at.s, cond)
        return one_jump(path, at.xt, xs, at.t, at.s)
