"""SCott: stochastic consistency distillation (Liu et al. 2025), https://arxiv.org/abs/2403.01505.

Consistency distillation whose solver is one of the teacher's SDE: the step from t_n down to t_m is
one of h short ones, each of which draws a part of its noise anew, as much as eta says
(`fewstep.distillation.flow_maps.stochastic_step`),

    L = E |X(x_t, t_n, s) - X^-(x_m, t_m, s)|^2 + w E -D(f(x_t)),

X^- an average of the student, s the end of the path, x_t noised data, and D a discriminator that
is shown the student's prediction f of x_0 and data, with the hinge loss. Fresh noise mends the
errors of the solver, and of the teacher, and more so in more steps.

It has a price. With the square of the difference the student learns the mean of its targets, so on
the fixed point a step shrinks towards E[x_0 given x_t]: on N(0, 1/4), from sigma = 80 in 39 steps,
the standard deviation of samples of one call is

    eta           0        0.1      0.3      0.6      1
    deviation     0.465    0.446    0.318    0.095    0.003

in place of 0.5, and at eta = 1 the student is the posterior mean, whatever the steps are. What is
lost the discriminator must bring back, and eta above 0.3 is refused. Published are eta = 0.2 and
h = 3, a step being 24 of a thousand timesteps, and the weight w = 0.4, which is taken to be
against the sum of squares over a sample's dimensions, since the paper's text was not at hand. Its
discriminator trains adapters on the teacher's decoder; here it is one of `Discriminator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath, same_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.flow_maps import (
    Ladder,
    Pair,
    follow,
    jump,
    pair_on,
    require_decay,
    start_of,
    stochastic_step,
    target_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.losses.score import mean_flat

STRONGEST = 0.3
"""The largest eta that is taken."""


@dataclass(frozen=True)
class SCott(Method):
    """SCott: one update of the discriminator, if there is one, then one of the student.

    It needs a teacher and data. ValueError for values out of range. Liu et al. 2025,
    https://arxiv.org/abs/2403.01505.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(10.0, 2, rho=3.0)
    """How the finished net generates; it starts at the latest time that is trained."""
    ladder: Ladder = Ladder(42)
    """The times of the teacher's steps, up to the sampler's first."""
    eta: float = 0.2
    """The share of fresh noise in a step, from 0, DDIM, to 0.3."""
    substeps: int = 3
    """h, the teacher's steps for one of the ladder, even in flow time."""
    gan: float = 0.4
    """w of the adversarial loss, against a square summed over dimensions; 0: no discriminator."""
    discriminator: Discriminator = Discriminator(None, "own", pool="learned", loss="hinge")
    """What tells the student's predictions from data, without noise."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if not 0 <= self.eta <= STRONGEST:
            raise ValueError(
                f"SCott.eta is between 0 and {STRONGEST}, since with more fresh noise the student "
                f"becomes the blurred mean of its targets; got {self.eta:g}"
            )
        if self.substeps < 1 or self.gan < 0:
            raise ValueError(
                f"SCott needs substeps >= 1 and gan >= 0, got {self.substeps} and {self.gan:g}"
            )

    @property
    def couples_samples(self) -> bool:
        """Whether the discriminator's loss of a sample is weighted by the mean over the batch."""
        return self.gan > 0 and self.discriminator.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, its average "target" unless decay is 0, and the judge."""
        nets = with_target(net, self.decay)
        return self.discriminator.equipped(nets, teacher) if self.gan else nets

    def turns(self, step: int) -> Sequence[Turn]:
        """The discriminator on predictions and data, then the student."""
        judge = (Turn("discriminator", self.discriminator_loss),) if self.gan else ()
        return *judge, Turn("student", self.student_loss)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def discriminator_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss on the data and on the student's predictions at noised data."""
        student: Any = nets["student"]
        at = self.pair(teacher.path, batch)
        with torch.no_grad():
            made = student(at.xt, at.t, at.cond)
            pair = self.discriminator.pair(teacher.path, made, need_data(self, batch), batch)
        return self.discriminator.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's ends of a stochastic step, and the adversarial term.

        Args:
            nets: the "student", and the "target" and the "discriminator" if there are any.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference, and
        "gan_loss".

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        path: NoisePath = teacher.path
        at = self.pair(path, batch)
        with target_of(nets) as net:
            target = jump(net, self.lower(teacher, at, batch), at.u, at.s, at.cond)
        f = student(at.xt, at.t, at.cond)
        made = path.ddim(at.xt, f, at.t, at.s)
        same_shape(prediction=made, x0=target)
        error = mean_flat((made - target) ** 2).mean()
        if not self.gan:
            return Loss(error, {"error": error.detach()})
        apart = batch._replace(draws=need_draws(batch).under("judge"))
        n = self.discriminator.noised(path, f, apart)
        fooled = self.discriminator.fool(nets, teacher, apart, n, batch.cond)
        logs = {"error": error.detach(), "gan_loss": fooled.gan_loss}
        return Loss(error + self.gan / f[0].numel() * fooled.total, logs)

    def pair(self, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time of the ladder, the time below it, and the ladder's end."""
        times = self.ladder.times(path, start_of(self.sampler, path))
        return pair_on(self, times, path, batch)

    def lower(self, teacher: Denoiser, at: Pair, batch: Batch) -> Tensor:
        """x_m: (B, *), `substeps` stochastic steps of the teacher from x_t to u."""
        path, draws = teacher.path, need_draws(batch)
        (start, end), xt, now = (path.flow_time(t) for t in (at.t, at.u)), at.xt, at.t
        for k in range(1, self.substeps + 1):
            last = k == self.substeps
            then = at.u if last else path.time_of(start + k / self.substeps * (end - start))
            x0 = guided(teacher, xt, now, at.cond, [self.kappa]).predictions[0]
            eps = draws.normal(f"step{k}", xt.shape[1:]).to(xt)
            xt, now = stochastic_step(path, xt, x0, eps, now, then, self.eta), then
        return xt
