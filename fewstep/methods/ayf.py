"""Align your flow (Sabour et al. 2025), https://arxiv.org/abs/2506.14603.

Two continuous-time objectives for one flow map. In flow time tau = sigma / (alpha + sigma), with
y = x_t / (alpha + sigma), a jump from tau to rho is y - (tau - rho) u(y, tau, rho) on any path,
and the student's mean velocity u is regressed on u^- - T / (|T| + c), u^- without a gradient and
|.| the norm over a sample. The tangent T says how far u^- is from the flow map.

Eulerian map distillation ("emd") varies the start of the jump along the teacher's velocity v,

    T = (u^- - v) + r (tau - rho) du^-/dtau,    (dy, dtau, drho) = (v, 1, 0),

which is flow matching for rho = tau, and a continuous-time consistency model for rho = 0. r warms
up from 0. While it is below 1 the fixed point is another map: published is 0.99 at last, where one
step makes a spread of 0.4957 for 0.5 on a Gaussian; here r reaches 1 unless `r` says otherwise.

Lagrangian map distillation ("lmd") varies the end, at which it asks the teacher:

    T = u^- - v(y_rho, rho) - (tau - rho) du^-/drho,    y_rho = y - (tau - rho) u^-.

In two dimensions it is the better one, on pictures the paper finds it too smooth. The lengths of
jumps, tau - rho, have a law of their own, and what is left of the path is uniform.

The paper was read in summaries: mean and spread of that law are not checked. Its teacher is guided
by a weaker model, which a run has not, and here by classifier-free guidance. An adversarial finish
is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.time_distributions import LogitNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    FlowPoint,
    mean_velocity,
    mean_velocity_by_end,
    noised,
    require_jumps,
    start_of,
    warmed_up,
)
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.distance import squared_norm
from fewstep.losses.score import mean_flat


@dataclass(frozen=True)
class AYF(Method):
    """Align your flow: one update of a student that jumps between any two times.

    It needs a teacher and data. ValueError for values out of range. Sabour et al. 2025,
    https://arxiv.org/abs/2506.14603.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Jumps(2.5)
    objective: Literal["emd", "lmd"] = "emd"
    """What is varied: the start of a jump, or its end."""
    lengths: TimeLaw = LogitNormal(-0.8, 1.0)
    """The law of tau - rho as a share of the flow time up to the sampler's first call."""
    warmup: int = 200
    """Steps in which r goes from 0 to its last value (published: 10,000)."""
    r: float = 1.0
    """The last value of r, of "emd" (published: 0.99)."""
    c: float = 0.1
    """c of T / (|T| + c), which bounds the push, |T| being a norm over a sample; above 0."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How derivatives are taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_jumps(self, self.sampler)
        if self.warmup < 0 or not 0 <= self.r <= 1 or self.c <= 0:
            raise ValueError(
                "AYF needs warmup >= 0, r in [0, 1] and c > 0, got "
                f"{self.warmup}, {self.r:g} and {self.c:g}"
            )

    def result(self, model: Model) -> Model:
        """`model` with a second time."""
        return model_with(model, "s")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with a second time, which it does not hear at first."""
        return Nets({"student": net_with(net, "s")})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, at the step's r."""
        r = self.r * warmed_up(step, self.warmup)
        return (Turn("student", partial(self.student_loss, r)),)

    def student_loss(self, r: float, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The regression of u on u^- - T / (|T| + c).

        Args:
            r: of the warm-up.
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "tangent", the mean |T|.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        at = self.point(student.path, teacher, batch)
        u, tangent = self.tangent(student, teacher, at, r)
        size = squared_norm(tangent).sqrt()
        made = at.velocity(student.path, student(at.xt, at.t, at.cond, s=at.s))
        loss = mean_flat((made - u + tangent / (size + self.c)) ** 2)
        return Loss(loss.mean(), {"tangent": size.mean()})

    @torch.no_grad()
    def point(self, path: NoisePath, teacher: Denoiser, batch: Batch) -> FlowPoint:
        """Noised data at t, the end s of a jump, and the teacher's prediction at t."""
        x0, draws = need_data(self, batch), need_draws(batch)
        start = path.flow_time(x0.new_full((), start_of(self.sampler, path)))
        length = self.lengths.quantile(draws.uniform("length")).to(x0)
        rest = draws.uniform("s").to(x0) * (1 - length)
        t, s = (path.time_of(start * share) for share in (rest + length, rest))
        xt = noised(path, x0, t, draws)
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        return FlowPoint(xt, t, s, batch.cond, f)

    @torch.no_grad()
    def tangent(
        self, student: Any, teacher: Denoiser, at: FlowPoint, r: float
    ) -> tuple[Tensor, Tensor]:
        """u^- and T before it is normalised: (B, *) both."""
        path: NoisePath = student.path
        if self.objective == "emd":
            flow = mean_velocity(student, at, self.derivative)
            return flow.u, flow.u - flow.v + r * flow.span * flow.rate
        flow = mean_velocity_by_end(student, at, self.derivative)
        rho = expand(path.flow_time(at.s), at.xt)
        y = at.place(path) - flow.span * flow.u
        xs = y * expand(path.alpha(at.s) + path.sigma(at.s), at.xt)
        f = guided(teacher, xs, at.s, at.cond, [self.kappa]).predictions[0]
        return flow.u, flow.u - (y - f) / rho - flow.span * flow.rate
