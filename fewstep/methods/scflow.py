"""SCFlow: self-corrected flow distillation (Dao et al. 2024).

A consistency model of a rectified flow, whose single call and whose few calls should agree
(https://arxiv.org/abs/2412.16906). Every path is one in flow time tau = sigma / (alpha + sigma).
The teacher's prediction at noised data x_t moves it along its tangent to a time below and to one
above, at random distances of at most `reach` in tau,

    tau_- = tau - U[0, min(tau, reach)],    tau_+ = tau + U[0, min(tau_T - tau, reach)],

and the student's prediction f of x_0 is that of both ends, as a slow copy f^- of it says:

    L =   E d(f(x_t) - f^-(x_-)) + w_up E d(f(x_t) - f^-(x_+))      consistency, in two directions
        + w_line E |f(x^_t) - sg G(z)|^2                            along its own straight line
        + w_gan E softplus(-D(G(z)))                                the discriminator

with d the mean of (y_i^2 + c^2)^(1/2) - c, G(z) = f(x_T) the student's sample of one call, and
x^_t the point at t of the straight line between that sample and its noise: what the student says
there again is its first answer (self-correction). Weights are those of the released code, in which
moreover the target below `truncate` is the datum itself.

As the steps become short, the first two terms are zero at the teacher's consistency function; over
steps of length h their targets are off by h^2. The third is zero at that function only where the
flow is straight, and the datum in place of a target makes posterior means of x_0, so both pull
away from it. f is here the jump to the end of the path (`fewstep.distillation.flow_maps`), which
keeps data where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.flow_maps import (
    follow,
    jump,
    noised,
    require_decay,
    target_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.distance import huber
from fewstep.losses.score import denoising


class Neighbours(NamedTuple):
    """Noised data x_t at t, and where the teacher's tangent leads at `low` <= t <= `high`.

    xt, below, above: (B, *); t, low, high and s, the end of the path: (B,).
    """

    xt: Tensor
    below: Tensor
    above: Tensor
    t: Tensor
    low: Tensor
    high: Tensor
    s: Tensor
    cond: Cond


@dataclass(frozen=True)
class SCFlow(Method):
    """SCFlow: one update of the discriminator, if there is one, then one of the student.

    It needs a teacher and data. ValueError for another sampler than `FewStep`, and for values out
    of range. Dao et al. 2024, https://arxiv.org/abs/2412.16906.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(10.0, 2, rho=3.0)
    """How the finished net generates, a `FewStep` from the latest time that is trained."""
    reach: float = 0.2
    """The longest step of the teacher, in flow time."""
    up: float = 0.1
    """w_up, the weight of consistency with later times."""
    line: float = 0.1
    """w_line, the weight of consistency along the straight line of the student's own sample."""
    gan: float = 0.1
    """w_gan, the weight of the adversarial loss; 0: without a discriminator."""
    discriminator: Discriminator = Discriminator(
        None, "own", penalty=GradientPenalty(r1=0.5), pool="learned"
    )
    """What tells G(z) from data: a network of its own on clean samples, as published."""
    c: float = 0.01
    """Size of an element's error at which d turns from a square to a modulus."""
    truncate: float = 0.0
    """The flow time below which the target is the datum (released code: 0.5)."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if not isinstance(self.sampler, FewStep):
            raise ValueError(f"SCFlow.sampler is a FewStep, got {self.sampler}")
        if not 0 < self.reach <= 1 or not 0 <= self.truncate <= 1 or self.c <= 0:
            raise ValueError(
                "SCFlow needs reach in (0, 1], truncate in [0, 1] and c > 0, got "
                f"{self.reach:g}, {self.truncate:g} and {self.c:g}"
            )
        if min(self.up, self.line, self.gan) < 0:
            raise ValueError(
                "SCFlow.up, line and gan are 0 or more, got "
                f"{self.up:g}, {self.line:g} and {self.gan:g}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the discriminator's loss of a sample is weighted by the mean over the batch."""
        return self.gan > 0 and self.discriminator.couples_samples

    @property
    def first(self) -> Rollout:
        """G(z): the sample of the first call."""
        return Rollout(self.sampler, 1)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, its average "target" unless decay is 0, and the judge."""
        nets = with_target(net, self.decay)
        return self.discriminator.equipped(nets, teacher) if self.gan else nets

    def turns(self, step: int) -> Sequence[Turn]:
        """The discriminator on G(z) and data, then the student."""
        judge = (self.discriminator.turn(self.first),) if self.gan else ()
        return *judge, Turn("student", self.student_loss)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The weighted sum of consistency, self-correction and the adversarial term.

        Args:
            nets: the "student", and the "target" and the "discriminator" if there are any.
            teacher: the teacher's denoiser.
            batch: z and x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "below", "above", "line" and "gan_loss".

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        at = self.neighbours(teacher, batch)
        below, above = self.targets(nets, at, need_data(self, batch))
        made = jump(student, at.xt, at.t, at.s, at.cond)
        logs = {
            "below": huber(made - below, self.c).mean(),
            "above": huber(made - above, self.c).mean(),
        }
        total = logs["below"] + self.up * logs["above"]
        if not self.line and not self.gan:
            return Loss(total, logs)
        state = self.first.state(nets, batch)
        sample = state.x0
        if self.line:
            on_line = teacher.path.ddim(state.xt, sample.detach(), state.t, at.t)
            again = student(on_line, at.t, at.cond)
            logs["line"] = denoising(again, sample.detach()).mean()
            total = total + self.line * logs["line"]
        if self.gan:
            judge = self.discriminator
            apart = batch._replace(draws=need_draws(batch).under("judge"))
            n = judge.noised(teacher.path, sample, apart)
            fooled = judge.fool(nets, teacher, apart, n, batch.cond)
            logs["gan_loss"] = fooled.gan_loss
            total = total + self.gan * fooled.total
        return Loss(total, logs)

    @torch.no_grad()
    def neighbours(self, teacher: Denoiser, batch: Batch) -> Neighbours:
        """Noised data at a random time, and one step of the teacher down and one up from there."""
        assert isinstance(self.sampler, FewStep)
        x0, draws, path = need_data(self, batch), need_draws(batch), teacher.path
        low, top = path.flow_time(constant([path.t_min, self.sampler.t_init], x0))
        u, down, up = (draws.uniform(name).to(x0) for name in ("t", "down", "up"))
        tau = low + (top - low) * u
        times = (
            tau,
            tau - down * (tau - low).clamp(max=self.reach),
            tau + up * (top - tau).clamp(max=self.reach),
        )
        t, lower, higher = (path.time_of(time) for time in times)
        xt = noised(path, x0, t, draws)
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        below, above = (path.ddim(xt, f, t, time) for time in (lower, higher))
        s = torch.full_like(t, path.t_min)
        return Neighbours(xt, below, above, t, lower, higher, s, batch.cond)

    def targets(self, nets: Nets, at: Neighbours, x0: Tensor) -> tuple[Tensor, Tensor]:
        """f^- at the points below and above, (B, *) both; of low times the data x0."""
        with target_of(nets) as net:
            path: NoisePath = net.path
            below = jump(net, at.below, at.low, at.s, at.cond)
            above = jump(net, at.above, at.high, at.s, at.cond)
            near = expand(path.flow_time(at.low) < self.truncate, below)
            return torch.where(near, x0, below), above
