"""MeanFlow (Geng et al. 2025), https://arxiv.org/abs/2505.13447, on any noise path.

A flow map is learned from its derivative. In flow time tau = sigma / (alpha + sigma), with
y = x_t / (alpha + sigma), every path is a rectified flow: y moves with the velocity
v = (y - f) / tau, f the prediction of x_0, and a jump from tau to rho is y - (tau - rho) u, u the
mean velocity in between. That u obeys the MeanFlow identity (equation 6)

    u = v - (tau - rho) du/dtau,    du/dtau along the flow: (dy, dtau, drho) = (v, 1, 0),

and the student's u is regressed on the right side, where the derivative is the student's own and
nothing has a gradient (equation 9). The student is a denoiser g with a second time
(`fewstep.diffusion.extra_inputs`), of which u = (y - g) / tau, so that g = f at rho = tau; the
derivative is `fewstep.diffusion.derivative.jvp`.

v is the teacher's, guided by `kappa`, or that of data and noise, v = eps - x_0 (training without a
teacher, in expectation the same). With `p` > 0 the loss is divided by its own size (section 4.3),
which is biased for the latter. Published is p = 1, for networks that begin at random and whose
errors have a floor. A student that begins as its teacher has no error at s = t, so that p = 1
weighs those samples up by 1 / c, and long jumps, whose errors are large, by next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.time_distributions import LogitNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import FlowPoint, OfFlowTime, mean_velocity, noised
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.distance import squared_norm


@dataclass(frozen=True)
class MeanFlow(Method):
    """MeanFlow: one update of a student that jumps between any two times.

    The defaults are those of ImageNet 256, with the teacher's velocity and plain squared errors,
    since p = 1 holds a student that starts as its teacher where it is. It needs data, and a
    teacher unless `velocity` is "data". ValueError for values out of range. Geng et al. 2025,
    https://arxiv.org/abs/2505.13447.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Jumps(2.5)
    times: TimeLaw = LogitNormal(-0.4, 1.0)
    """Both times are drawn from it, as flow times tau in (0, 1); the larger is t."""
    diagonal: float = 0.75
    """Share of samples with s = t, whose target is the velocity itself."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Where the velocity v comes from: the teacher, or the data and their noise."""
    p: float = 0.0
    """The loss of a sample is divided by (|u - target|^2 + c)^p (published: 1)."""
    c: float = 1e-3
    """What that divisor adds to the squared error, above 0."""
    kappa: float = 1.0
    """Guidance scale of the teacher's velocity, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How du/dtau is taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diagonal <= 1 or self.p < 0 or self.c <= 0:
            raise ValueError(
                "MeanFlow needs diagonal in [0, 1], p >= 0 and c > 0, got "
                f"{self.diagonal:g}, {self.p:g} and {self.c:g}"
            )
        if self.velocity == "data" and self.kappa != 1:
            raise ValueError("MeanFlow.kappa guides the teacher's velocity, not that of data")

    def result(self, model: Model) -> Model:
        """`model` with a second time."""
        return model_with(model, "s")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with a second time, which it does not hear at first."""
        return Nets({"student": net_with(net, "s")})

    def noise_levels(self, path: NoisePath) -> TimeLaw:
        """The times at which the flow time is distributed as `times` says."""
        return OfFlowTime(self.times, path)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The regression of the student's mean velocity on its target.

        Args:
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of u - target.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        at = self.point(student.path, teacher, batch)
        target = self.target(student, at)
        made = at.velocity(student.path, student(at.xt, at.t, at.cond, s=at.s))
        apart = made - target
        error = (apart**2).flatten(1).mean(1)
        size = squared_norm(apart.detach()).flatten()
        return Loss((error / (size + self.c) ** self.p).mean(), {"error": error.mean()})

    @torch.no_grad()
    def point(self, path: NoisePath, teacher: Denoiser, batch: Batch) -> FlowPoint:
        """Noised data at two random times, and the prediction f there."""
        x0, draws = need_data(self, batch), need_draws(batch)
        taus = torch.stack([self.times.quantile(draws.uniform(name)) for name in ("t", "s")])
        t, s = (path.time_of(tau.to(x0)) for tau in (taus.amax(0), taus.amin(0)))
        s = torch.where(draws.uniform("diagonal") < self.diagonal, t, s)
        xt = noised(path, x0, t, draws)
        if self.velocity == "data":
            return FlowPoint(xt, t, s, batch.cond, x0)
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        return FlowPoint(xt, t, s, batch.cond, f)

    @torch.no_grad()
    def target(self, student: Any, at: FlowPoint) -> Tensor:
        """v - (tau - rho) du/dtau of the student: (B, *)."""
        flow = mean_velocity(student, at, self.derivative)
        return flow.v - flow.span * flow.rate
