"""TraFlow: trajectory distillation of a rectified flow (Wu et al. 2025).

A student that jumps between any two times of the teacher's flow can be told of the flow in three
ways, and is told all of them at once (https://arxiv.org/abs/2502.16972). In flow time
tau = sigma / (alpha + sigma), with y = x_t / (alpha + sigma), every path is a rectified flow: y
moves with the velocity v = (y - f) / tau, f the teacher's prediction of x_0. From tau to rho that
leads to Phi(y, tau, rho), and the student to

    G(y, tau, rho) = y - (tau - rho) u(y, tau, rho),    u = (y - g) / tau,

u a mean velocity and g a denoiser with a second time (`fewstep.diffusion.extra_inputs`), so that
G(y, tau, tau) = y by itself. The loss is

    L =   w_1 E |G(y, tau, rho) - Phi(y, tau, rho)|^2                        where it ends
        + w_2 E |dG/drho (y, tau, rho) - v(G^-(y, tau, rho), rho)|^2         how it moves there
        + w_3 E |G(y, tau, rho) - G^-(Phi(y, tau, nu), nu, rho)|^2           from any point between

with rho <= nu <= tau and G^- without a gradient. All are zero for G = Phi, and no other G makes
the first or the second zero everywhere. They are the endpoint, the Lagrangian and the semigroup of
flow maps; the first alone would do, but for a solver of many steps.

The second is computed as |u - (v + (tau - rho) du^-/drho)|^2, which has its value, and a gradient
through u alone: no derivative of a derivative. At rho = tau it is the teacher's velocity. Phi is
`steps` steps from tau to nu and as many from there to rho, of one run of the solver. The paper's
text was not at hand: the weights are 1 here, and both times are uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    along_the_end,
    flow_end,
    jump,
    noised,
    rectified,
    start_of,
    target_of,
)
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.score import denoising


class Stretch(NamedTuple):
    """Noised data x_t (B, *) and where the teacher's flow takes it: x_u and x_s, (B, *) both.

    t >= u >= s: (B,) each; cond: the samples' conditions.
    """

    xt: Tensor
    xu: Tensor
    xs: Tensor
    t: Tensor
    u: Tensor
    s: Tensor
    cond: Cond


class Terms(NamedTuple):
    """The three terms of each sample, (B,) each."""

    endpoint: Tensor
    velocity: Tensor
    consistency: Tensor


@dataclass(frozen=True)
class TraFlow(Method):
    """TraFlow: one update of a student that jumps between any two times.

    It needs a teacher and data. ValueError for values out of range. Wu et al. 2025,
    https://arxiv.org/abs/2502.16972.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Jumps(10.0, 2, 3.0)
    """How the finished net generates; it starts at the latest time that is trained."""
    endpoint: float = 1.0
    """w_1, of the distance from the solver's end."""
    velocity: float = 1.0
    """w_2, of the distance from the teacher's velocity."""
    consistency: float = 1.0
    """w_3, of the distance from the student's own end, from a point in between."""
    diagonal: float = 0.25
    """Share of samples with s = t, whose target is the velocity itself."""
    steps: int = 2
    """Steps of the teacher's solver from t to u, and again from u to s."""
    order: Literal[1, 2] = 2
    """Order of the teacher's solver: 2 is Heun's method, 1 DDIM."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How du/drho is taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.endpoint, self.velocity, self.consistency
        if min(weights) < 0 or max(self.endpoint, self.velocity) == 0:
            raise ValueError(
                "TraFlow needs weights of 0 or more, and endpoint or velocity above 0, since "
                f"consistency alone is zero for a student that stays where it is; got {weights}"
            )
        if not 0 <= self.diagonal < 1 or self.steps < 1:
            raise ValueError(
                "TraFlow needs diagonal in [0, 1) and steps >= 1, got "
                f"{self.diagonal:g} and {self.steps}"
            )

    def result(self, model: Model) -> Model:
        """`model` with a second time."""
        return model_with(model, "s")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with a second time, which it does not hear at first."""
        return Nets({"student": net_with(net, "s")})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The weighted sum of the three terms.

        Args:
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "endpoint", "velocity" and "consistency".

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        terms = self.terms(nets, teacher, self.stretch(teacher, batch))
        means = {name: term.mean() for name, term in terms._asdict().items()}
        total = sum(getattr(self, name) * mean for name, mean in means.items())
        return Loss(total, means)

    @torch.no_grad()
    def stretch(self, teacher: Denoiser, batch: Batch) -> Stretch:
        """Noised data at a random time t, and the teacher's flow from there to u and to s."""
        x0, draws, path = need_data(self, batch), need_draws(batch), teacher.path
        ends = constant([path.t_min, start_of(self.sampler, path)], x0)
        low, top = path.flow_time(ends)
        shares = torch.stack([draws.uniform(name) for name in ("t", "s")]).to(x0)
        later, earlier = (low + (top - low) * share for share in (shares.amax(0), shares.amin(0)))
        earlier = torch.where(draws.uniform("diagonal") < self.diagonal, later, earlier)
        between = earlier + draws.uniform("u").to(x0) * (later - earlier)
        t, u, s = (path.time_of(tau) for tau in (later, between, earlier))
        xt, how = noised(path, x0, t, draws), (batch.cond, self.kappa, self.steps, self.order)
        xu = flow_end(teacher, xt, t, u, *how)
        return Stretch(xt, xu, flow_end(teacher, xu, u, s, *how), t, u, s, batch.cond)

    def terms(self, nets: Nets, teacher: Denoiser, at: Stretch) -> Terms:
        """The terms, with the student's gradient through G and u."""
        student: Any = nets["student"]
        path: NoisePath = student.path
        (y, tau), (end, rho) = rectified(path, at.xt, at.t), rectified(path, at.xs, at.s)
        with target_of(nets) as net:
            moved = self.moved(net, teacher, at)
            again, _ = rectified(path, jump(net, at.xu, at.u, at.s, at.cond, {"s": at.s}), at.s)
        u = (y - student(at.xt, at.t, at.cond, s=at.s)) / tau
        made = y - (tau - rho) * u
        return Terms(denoising(made, end), denoising(u, moved), denoising(made, again))

    def moved(self, net: Any, teacher: Denoiser, at: Stretch) -> Tensor:
        """v(G^-, rho) + (tau - rho) du^-/drho: (B, *)."""
        path: NoisePath = teacher.path
        g, rate = along_the_end(net, at.xt, at.t, at.s, at.cond, self.derivative)
        made = path.ddim(at.xt, g, at.t, at.s)
        f = guided(teacher, made, at.s, at.cond, [self.kappa]).predictions[0]
        (_, tau), (there, rho) = rectified(path, at.xt, at.t), rectified(path, made, at.s)
        _, speed = torch.func.jvp(path.flow_time, (at.s,), (torch.ones_like(at.s),))  # type: ignore[misc]
        return (there - f) / rho - (tau - rho) * rate / (expand(speed, rate) * tau)
