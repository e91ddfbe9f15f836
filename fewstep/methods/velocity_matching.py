"""Marginal-data transport distillation (Zhou et al. 2025), https://arxiv.org/abs/2509.04406.

A student of one time jumps to the data, x_0 = y - tau u(y, tau) in flow time
tau = sigma / (alpha + sigma), y = x_t / (alpha + sigma). That is the teacher's transport where the
mean velocity u obeys

    v = d(tau u)/dtau = u + tau du/dtau,    du/dtau along the teacher's velocity v,

so u is regressed, on noised data, towards u* = v - tau du^-/dtau: velocity matching, MeanFlow at
the end of the path. Since u* is made of the student itself, its gradient is biased while that is
far off. Velocity distillation adds a second, on samples of the student, x = g(z): at x with new
noise the student's own velocity says where its samples lie, and u* where the teacher wants them,

    L = match E |u - u*|^2 + distil E <sg(u* - u)(x_t), x>,

the push of distribution matching with the student as its own fake score.

Released code divides du/dtau alone by its norm plus c ("rate"). At the exact map u* is then
another velocity, so that this is no fixed point; the default ("whole") divides the difference
u* - u, which is zero there whatever it is divided by. In the code lambda is 1 for both terms, and
its guidance 40 for matching and 100 for distillation; the paper's text was not read beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw, Uniform
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import generate
from fewstep.distillation.flow_maps import FlowPoint, mean_velocity, noised, start_of
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.losses.distance import squared_norm
from fewstep.losses.score import mean_flat


@dataclass(frozen=True)
class VelocityMatching(Method):
    """MDT-dist: one update of a student by velocity matching and velocity distillation.

    It needs a teacher and data. ValueError for values out of range. Zhou et al. 2025,
    https://arxiv.org/abs/2509.04406.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(2.5)
    shares: TimeLaw = Uniform()
    """The law of tau as a share of the flow time of the sampler's first call."""
    match: float = 1.0
    """Weight of velocity matching."""
    distil: float = 1.0
    """Weight of velocity distillation; 0: none."""
    normalise: Literal["whole", "rate", "none"] = "whole"
    """What is divided by its norm plus c: u* - u, du/dtau alone (as released), or nothing."""
    c: float = 0.1
    """What is added to that norm, which is one over a sample; above 0."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How du/dtau is taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match < 0 or self.distil < 0 or not self.match + self.distil or self.c <= 0:
            raise ValueError(
                "VelocityMatching needs match and distil of 0 or more, not both 0, and c > 0; got "
                f"{self.match:g}, {self.distil:g} and {self.c:g}"
            )

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student alone: a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """Velocity matching on noised data, and velocity distillation on samples.

        Args:
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: z and x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "match", the mean |u* - u| on data.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        x0 = need_data(self, batch)
        at = self.point(student.path, teacher, x0, batch)
        u, pull = self.pull(student, at)
        logs = {"match": squared_norm(pull).sqrt().mean()}
        made = at.velocity(student.path, student(at.xt, at.t, at.cond))
        total = self.match * mean_flat((made - u - pull) ** 2).mean()
        if self.distil:
            x = generate(nets, self.sampler, batch)
            own = batch._replace(draws=need_draws(batch).under("distil"))
            _, push = self.pull(student, self.point(student.path, teacher, x.detach(), own))
            total = total + self.distil * mean_flat(push * x).mean()
        return Loss(total, logs)

    @torch.no_grad()
    def point(self, path: NoisePath, teacher: Denoiser, x: Tensor, batch: Batch) -> FlowPoint:
        """x with noise at a random time, the path's end, and the teacher's prediction."""
        draws = need_draws(batch)
        start = path.flow_time(x.new_full((), start_of(self.sampler, path)))
        t = path.time_of(start * self.shares.quantile(draws.uniform("t")).to(x))
        xt = noised(path, x, t, draws)
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        return FlowPoint(xt, t, torch.zeros_like(t), batch.cond, f)

    @torch.no_grad()
    def pull(self, student: Any, at: FlowPoint) -> tuple[Tensor, Tensor]:
        """u and u* - u, normalised: (B, *) both."""
        flow = mean_velocity(student, at, self.derivative, told=False)
        tau = expand(student.path.flow_time(at.t), at.xt)
        moved = tau * flow.rate
        if self.normalise == "rate":
            size = squared_norm(flow.rate).sqrt()
            return flow.u, flow.v - moved / (size + self.c) - flow.u
        pull = flow.v - moved - flow.u
        if self.normalise == "whole":
            pull = pull / (squared_norm(pull).sqrt() + self.c)
        return flow.u, pull
