"""What the consistency methods share: a ladder of times, one step of the teacher, and targets.

A flow map X(x_t, t, s) carries a point of the teacher's probability flow from t to s. A network g
that predicts x_0 gives one by the deterministic step that believes it, `NoisePath.ddim`,

    X(x_t, t, s) = A x_t + B g(x_t, t),    A = sigma_s / sigma_t,  B = alpha_s - alpha_t A,

so that X(x_t, t, t) = x_t whatever g is: the boundary condition needs no coefficients. Consistency
methods ask that X agrees at neighbouring points of one trajectory,

    X(x_t, t, s) = X^-(x_u, u, s),    s <= u < t,

with x_u the end of a solver's step from x_t, and X^- without a gradient: an average of the
student, or the student itself. (Song et al. 2023, https://arxiv.org/abs/2303.01469, where s is the
path's end; Kim et al. 2024, https://arxiv.org/abs/2310.02279, for any s.) At s the target is x_s
itself, which is where everything that is learned comes from; the fixed point is the product of
the solver's steps.

Methods of infinitely small steps learn the mean velocity u from t to s instead. In flow time
tau = sigma / (alpha + sigma) a jump of y = x / (alpha + sigma) is y - (tau - rho) u on every path,
and what they need is u and its derivatives (`mean_velocity`, `mean_velocity_by_end`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.derivative import difference_step, jvp
from fewstep.diffusion.guidance import Scale, guided
from fewstep.diffusion.noise_path import (
    VE,
    VP,
    NoisePath,
    coefficients,
    expand,
    perturb,
    same_shape,
    x0_to_velocity,
)
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps, WithInput, ladder_of
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler, device_of
from fewstep.distillation.method import Loss, Nets, Step, need_data, need_draws
from fewstep.losses.distance import huber


@dataclass(frozen=True)
class Ladder:
    """The times t_0 < ... < t_N that a solver steps between, from the path's end to the start.

        t_i = (t_min^(1/rho) + (i / N) (start^(1/rho) - t_min^(1/rho)))^rho

    On a path of timesteps (VP) they are whole, ceil((start + 1) (i / N)^rho) - 1, and t_0 = 0:
    with N = 50 the times 0, 19, 39, ..., 999 of DDIM. Where there are fewer timesteps than steps,
    each is there once.

    ValueError for N < 1 or rho <= 0.
    """

    steps: int = 17
    """N, the number of steps."""
    rho: float | None = None
    """Spacing; None: 7 where t is the noise level itself (VE), as EDM has it, and 1 elsewhere."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.rho is not None and self.rho <= 0):
            raise ValueError(f"Ladder needs steps >= 1 and rho > 0, got {self}")

    def times(self, path: NoisePath, start: float) -> list[float]:
        """t_0 = path.t_min < ... < t_N = start."""
        rho = self.rho or (7.0 if isinstance(path, VE) else 1.0)
        shares = [i / self.steps for i in range(1, self.steps + 1)]
        if isinstance(path, VP):
            whole = (math.ceil((start + 1) * share**rho - 1e-6) - 1 for share in shares)
            return sorted({0.0, *(float(t) for t in whole)})
        low, high = path.t_min ** (1 / rho), start ** (1 / rho)
        inner = [(low + share * (high - low)) ** rho for share in shares[:-1]]
        return [path.t_min, *inner, start]


@dataclass(frozen=True)
class OfFlowTime(TimeLaw):
    """The times of a path whose flow time has the law `taus`."""

    taus: TimeLaw
    """The law of the flow time tau = sigma / (alpha + sigma), in (0, 1)."""
    path: NoisePath
    """The noise path whose times these are."""

    def quantile(self, u: Tensor) -> Tensor:
        """u in (0, 1), of any shape -> times of that shape."""
        return self.path.time_of(self.taus.quantile(u))


class Pair(NamedTuple):
    """Noised data x_t (B, *), its time t, the time u < t of the solver's step, and the end s <= u.

    t, u, s: (B,) each; cond: the samples' conditions.
    """

    xt: Tensor
    t: Tensor
    u: Tensor
    s: Tensor
    cond: Cond


def start_of(sampler: Sampler, path: NoisePath) -> float:
    """The time of a sampler's first call; ValueError for one without a ladder of times."""
    ladder = ladder_of(sampler, path)
    if ladder is None:
        raise ValueError(
            f"a consistency model is sampled by FewStep or Jumps, which say where they start, not "
            f"by {sampler}"
        )
    return ladder[0]


def level(path: NoisePath, t: Tensor) -> Tensor:
    """The noise level sigma_t / alpha_t, which is EDM's sigma: any shape -> the same shape."""
    return path.sigma(t) / path.alpha(t)


def time_of_level(path: NoisePath, level: Tensor) -> Tensor:
    """The time in [t_min, t_max] whose noise level is nearest to `level`; its shape."""
    return path.time_of(1 / (1 + 1 / level))


def times_of_levels(levels: TimeLaw, path: NoisePath, start: float, u: Tensor) -> Tensor:
    """Times whose noise level has the law `levels`, those above `start` set to it.

    u: in (0, 1), any shape -> the same shape.
    """
    return time_of_level(path, levels.quantile(u)).clamp(max=start)


def noised(path: NoisePath, x0: Tensor, t: Tensor, draws: Draws) -> Tensor:
    """x_t of data x_0 (B, *) at t (B,), with the noise "eps" of the draws."""
    return perturb(path, x0, draws.normal("eps", x0.shape[1:]).to(x0), t)


def pair_on(method: object, times: Sequence[float], path: NoisePath, batch: Batch) -> Pair:
    """Noised data at a random one of the increasing `times` but the first.

    u is the time below it, and s the first; the draws "t" and "eps" are used. ValueError, which
    names the method, where the batch has no data or draws.
    """
    x0, draws = need_data(method, batch), need_draws(batch)
    ladder = constant(times, x0)
    n = draws.integers("t", len(ladder) - 1)
    t, u = ladder[n + 1], ladder[n]
    return Pair(noised(path, x0, t, draws), t, u, ladder[0].expand_as(t), batch.cond)


def jump(
    net: Any,
    xt: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    named: Mapping[str, Tensor] = {},
    own: Scale = 1.0,
) -> Tensor:
    """X(x_t, t, s) of `net`, guided by `own` and told the inputs `named`: (B, *)."""
    path: NoisePath = net.path
    return path.ddim(xt, guided(net, xt, t, cond, [own], named=named).predictions[0], t, s)


def one_jump(path: NoisePath, xt: Tensor, xs: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """g of the jump that leads from x_t to x_s: `NoisePath.ddim` solved for it, (B, *).

    xt and xs: (B, *), t and s: (B,). In double precision, as B is small where s is near t.
    """
    alpha, sigma = coefficients(path, xt.double(), t.double())
    alpha_s, sigma_s = coefficients(path, xt.double(), s.double())
    a = sigma_s / sigma
    return ((xs.double() - a * xt.double()) / (alpha_s - alpha * a)).to(xt)


def solve(
    teacher: Denoiser, xt: Tensor, t: Tensor, u: Tensor, cond: Cond, kappa: Scale, order: int
) -> Tensor:
    """x_u: one step of the teacher's probability flow, guided by `kappa`.

    order: 1 is DDIM, 2 Heun's method, with a second call at u. Returns (B, *).
    """
    path = teacher.path
    x0 = guided(teacher, xt, t, cond, [kappa]).predictions[0]
    xu = path.ddim(xt, x0, t, u)
    if order == 1:
        return xu
    return path.heun(xu, x0, guided(teacher, xu, u, cond, [kappa]).predictions[0], t, u)


def solve_along(
    teacher: Denoiser, xt: Tensor, times: Tensor, cond: Cond, kappa: Scale, order: int
) -> Tensor:
    """x_u: steps of the teacher, as of `solve`, between times (B, N + 1) that decrease to u."""
    for t, u in pairwise(times.unbind(1)):
        xt = solve(teacher, xt, t, u, cond, kappa, order)
    return xt


def rectified(path: NoisePath, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """y = x_t / (alpha + sigma), (B, *), and its flow time tau, (B, 1, ..., 1).

    In these coordinates every path is a rectified flow: dy/dtau = (y - f) / tau.
    """
    alpha, sigma = coefficients(path, xt, t)
    return xt / (alpha + sigma), sigma / (alpha + sigma)


def flow_end(
    teacher: Denoiser,
    xt: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    kappa: Scale,
    steps: int,
    order: int,
) -> Tensor:
    """x_s: (B, *), after `steps` steps of `solve`, even in flow time, from t to s, (B,) both."""
    (start, end), now = (teacher.path.flow_time(u) for u in (t, s)), t
    for k in range(1, steps + 1):
        then = s if k == steps else teacher.path.time_of(start + k / steps * (end - start))
        xt, now = solve(teacher, xt, now, then, cond, kappa, order), then
    return xt


def stochastic_step(
    path: NoisePath, xt: Tensor, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, eta: float
) -> Tensor:
    """The step of `ddim` from t to s <= t, of whose noise a part is drawn anew.

        x_s = alpha_s x_0 + (sigma_s^2 - tau^2)^(1/2) eps^ + tau eps,
        tau = eta (sigma_s / sigma_t) (sigma_t^2 - (alpha_t sigma_s / alpha_s)^2)^(1/2),

    eps^ being the noise that x_t and the prediction x_0 imply. eta = 0 is `ddim`, eta = 1
    `ancestral`. xt, x0, eps: (B, *), t, s: (B,) -> (B, *). Song et al. 2020,
    https://arxiv.org/abs/2010.02502, equations 12 and 16. ValueError where the shapes do not fit.
    """
    same_shape(xt=xt, x0=x0, eps=eps)
    alpha, sigma = coefficients(path, xt, t)
    alpha_s, sigma_s = coefficients(path, xt, s)
    left = alpha * sigma_s / alpha_s
    tau = eta * sigma_s / sigma * ((sigma - left) * (sigma + left)).clamp(min=0).sqrt()
    implied = (xt - alpha * x0) / sigma
    return alpha_s * x0 + (sigma_s**2 - tau**2).clamp(min=0).sqrt() * implied + tau * eps


def both_ends(
    nets: Nets,
    teacher: Denoiser,
    at: Pair,
    kappa: Scale,
    order: int,
    named: Mapping[str, Tensor] = {},
    own: Scale = 1.0,
) -> tuple[Tensor, Tensor]:
    """X(x_t, t, s) and X^-(x_u, u, s), x_u one step of the teacher from x_t: (B, *) both.

    The first has the student's gradient, the second none. `named` is what both are told besides,
    and `own` the scale that both are guided by, 0 where they have no condition.
    """
    with target_of(nets) as net:
        xu = solve(teacher, at.xt, at.t, at.u, at.cond, kappa, order)
        target = jump(net, xu, at.u, at.s, at.cond, named, own)
    prediction = jump(nets["student"], at.xt, at.t, at.s, at.cond, named, own)
    same_shape(prediction=prediction, x0=target)
    return prediction, target


@torch.no_grad()
def along_the_flow(
    student: Any,
    xt: Tensor,
    t: Tensor,
    f: Tensor,
    cond: Cond,
    how: Literal["forward", "difference"],
    named: Mapping[str, Tensor] = {},
) -> tuple[Tensor, Tensor]:
    """The student's prediction g at x_t and dg/dt along the flow of the prediction f, no graphs.

    The direction is (dx_t, dt) = (alpha' f + sigma' eps, 1); the inputs `named` stay as they are.
    """
    path: NoisePath = student.path

    def g(xt: Tensor, t: Tensor) -> Tensor:
        out: Tensor = student(xt, t, cond, **named)
        return out

    settings: dict[str, Any] = {}
    if how == "difference":
        room = (path.t_min - t, path.t_max - t)
        settings = {"how": how, "h": difference_step(path, t), "room": room}
    along = x0_to_velocity(path, xt, f, t)
    return jvp(g, (xt, t), (along, 1.0), net=student, **settings)


@torch.no_grad()
def along_the_end(
    student: Any,
    xt: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    how: Literal["forward", "difference"],
) -> tuple[Tensor, Tensor]:
    """The flow map's prediction g(x_t, t, s) and dg/ds: (B, *) both, no graphs."""
    path: NoisePath = student.path

    def g(s: Tensor) -> Tensor:
        out: Tensor = student(xt, t, cond, s=s)
        return out

    settings: dict[str, Any] = {}
    if how == "difference":
        room = (path.t_min - s, path.t_max - s)
        settings = {"how": how, "h": difference_step(path, s), "room": room}
    return jvp(g, (s,), (1.0,), net=student, **settings)


def warmed_up(step: int, steps: int) -> float:
    """How much of a term that grows over `steps` steps counts at one, from 0: 0 to 1."""
    return min(1.0, step / steps) if steps else 1.0


def huber_loss(made: Tensor, target: Tensor, c: float) -> Loss:
    """The `huber` distance of two predictions (B, *), a mean; logs "error", the mean square."""
    apart = made - target
    return Loss(huber(apart, c).mean(), {"error": (apart.detach() ** 2).mean()})


def with_target(net: nn.Module, decay: float) -> Nets:
    """The student, a copy of `net`, and for decay > 0 the "target" that follows it."""
    names = ("student", "target") if decay else ("student",)
    return Nets({name: deepcopy(net) for name in names})


@contextmanager
def target_of(nets: Nets) -> Iterator[Any]:
    """Within the block, the network that targets come from, without a gradient.

    Where that is the student, the block's random numbers are drawn again after it, so that the
    same units drop out in both calls (Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189,
    appendix A).
    """
    net: Any = nets["target"] if "target" in nets else nets["student"]
    device = device_of(net)
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=net.training):
        yield net


@torch.no_grad()
def follow(step: Step, decay: float, name: str = "target") -> None:
    """nets[name], if it is there, <- decay itself + (1 - decay) student; buffers are copied."""
    if name not in step.nets:
        return
    target, student = step.nets[name], step.nets["student"]
    for mine, other in zip(target.parameters(), student.parameters(), strict=True):
        mine.lerp_(other.to(mine), 1 - decay)
    for buffer, theirs in zip(target.buffers(), student.buffers(), strict=True):
        buffer.copy_(theirs)


def require_decay(method: object, decay: float) -> None:
    """ValueError unless 0 <= decay < 1."""
    if not 0 <= decay < 1:
        name = type(method).__name__
        raise ValueError(
            f"{name}.decay is at least 0, the student itself, and below 1; got {decay:g}"
        )


def tells_end(sampler: Sampler) -> bool:
    """Whether a sampler tells the student where it jumps, by the name "s": `Jumps` does."""
    while isinstance(sampler, WithInput):
        sampler = sampler.sampler
    return isinstance(sampler, Jumps)


def require_jumps(method: object, sampler: Sampler) -> None:
    """ValueError unless the sampler tells the student where it jumps."""
    if not tells_end(sampler):
        name = type(method).__name__
        raise ValueError(
            f"{name} trains a flow map, which Jumps samples; its sampler is {sampler}"
        )


def told_end(sampler: Sampler, s: Tensor) -> Mapping[str, Tensor]:
    """What a student that this samples is told of the end s of a jump: {"s": s}, or nothing."""
    return {"s": s} if tells_end(sampler) else {}


def times_of_calls(sampler: FewStep | Jumps, path: NoisePath) -> list[float]:
    """The times that a sampler's calls lead between, from the path's end to the first call's.

    Those below the path's end, if any, are left out.
    """
    return [path.t_min, *(t for t in reversed(sampler.ladder(path)) if t > path.t_min)]


def require_path_of_calls(method: object, sampler: Sampler) -> None:
    """ValueError unless the sampler steps deterministically between times that are spaced evenly,
    but for its rho: `FewStep` with noise "ddim", or `Jumps`.
    """
    jumps = isinstance(sampler, Jumps)
    steps = isinstance(sampler, FewStep) and sampler.noise == "ddim" and not sampler.times
    if not (jumps or steps):
        raise ValueError(
            f"{type(method).__name__}.sampler is a FewStep(t_init, steps, 'ddim', rho) or "
            f"Jumps(t_init, steps, rho), got {sampler}"
        )


class FlowPoint(NamedTuple):
    """Where a mean velocity is learnt: x_t (B, *), t and the end s <= t (B,), conditions, and f.

    f: (B, *), the prediction of x_0 whose velocity is followed.
    """

    xt: Tensor
    t: Tensor
    s: Tensor
    cond: Cond
    f: Tensor

    def place(self, path: NoisePath) -> Tensor:
        """y = x_t / (alpha_t + sigma_t), which moves as a rectified flow in flow time: (B, *)."""
        return self.xt / expand(path.alpha(self.t) + path.sigma(self.t), self.xt)

    def velocity(self, path: NoisePath, x0: Tensor) -> Tensor:
        """(y - x_0) / tau, the velocity that a prediction of x_0 means: (B, *)."""
        same_shape(xt=self.xt, x0=x0)
        return (self.place(path) - x0) / expand(path.flow_time(self.t), self.xt)


class MeanVelocity(NamedTuple):
    """The student's mean velocity u from tau to rho, its derivative, and the velocity v at tau.

    u, rate, v: (B, *), without graphs; span: tau - rho, (B, 1, ..., 1).
    """

    u: Tensor
    rate: Tensor
    v: Tensor
    span: Tensor


def _span(path: NoisePath, at: FlowPoint) -> Tensor:
    return expand(path.flow_time(at.t) - path.flow_time(at.s), at.xt)


def mean_velocity(
    student: Any, at: FlowPoint, how: Literal["forward", "difference"], told: bool = True
) -> MeanVelocity:
    """u and du/dtau along the flow of at.f: in the direction (dy, dtau, drho) = (v, 1, 0).

    told: whether the student is told s.
    """
    path: NoisePath = student.path
    named = {"s": at.s} if told else {}
    value, rate = along_the_flow(student, at.xt, at.t, at.f, at.cond, how, named)
    tau, speed = torch.func.jvp(path.flow_time, (at.t,), (torch.ones_like(at.t),))  # type: ignore[misc]
    tau, speed = expand(tau, at.xt), expand(speed, at.xt)
    u, v = at.velocity(path, value), at.velocity(path, at.f)
    return MeanVelocity(u, (v - u - rate / speed) / tau, v, _span(path, at))


def mean_velocity_by_end(
    student: Any, at: FlowPoint, how: Literal["forward", "difference"]
) -> MeanVelocity:
    """u and du/drho, the end of the jump moving alone; v is at tau all the same."""
    path: NoisePath = student.path
    value, rate = along_the_end(student, at.xt, at.t, at.s, at.cond, how)
    _, speed = torch.func.jvp(path.flow_time, (at.s,), (torch.ones_like(at.s),))  # type: ignore[misc]
    tau, speed = expand(path.flow_time(at.t), at.xt), expand(speed, at.xt)
    u, v = at.velocity(path, value), at.velocity(path, at.f)
    return MeanVelocity(u, -rate / (speed * tau), v, _span(path, at))
