"""Target-driven distillation (Wang et al. 2024), https://arxiv.org/abs/2409.01347.

Of all jumps that a consistency trajectory model learns, few are ever made: from one call's time to
the next one's, for the few numbers of calls that one uses. So the ends s of training are drawn
from those times alone, the targets of K calls for K from 4 to 8 together for a student of four,

    s = (1 - rho U) s',    s' one of the targets in [m - window, m],

m being the largest target that is not above u, and U uniform: a little noise, since samplers with
fresh noise end a bit lower (section 3.1). With x_u one step of the guided teacher from x_t,

    L = E d(X(x_t, t, s), X^-(x_u, u, s)),    d(y) = mean_i (y_i^2 + c^2)^(1/2) - c,

X^- an average of the student, without a gradient; published is the student itself (`decay` 0), as
adapters of a large network with small rates. A student that a `Jumps` samples is told s, and the
product of the teacher's steps is its fixed point; published ones are not told, and make one
prediction for all the ends of a time.

Guidance is decoupled (section 3.2): the teacher is guided by one scale, and a share `drop` of
samples is distilled without a condition, so that the student can be guided once more where it is
sampled. The window is a share of the ladder, published 260 of a thousand timesteps: a little more
than a call of four. A student of another number of calls has the targets of that many and more and
as much of its own call, or it would never learn the jumps that it makes. The variant with a
discriminator is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import Scale
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP, NoisePath
from fewstep.diffusion.samplers import Ancestral, FewStep, Jumps
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Pair,
    both_ends,
    follow,
    huber_loss,
    noised,
    require_decay,
    require_path_of_calls,
    tells_end,
    told_end,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with


@dataclass(frozen=True)
class TDD(Method):
    """Target-driven distillation: one update of a student that jumps to times of few calls.

    Targets and window are the published ones for a sampler of four calls, and alike for others:
    from so many calls to twice as many, and the end alone for one call. It needs a teacher and
    data. ValueError for values out of range. Wang et al. 2024, https://arxiv.org/abs/2409.01347.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(2.5, 4, "ddim", 2.0)
    """A `FewStep` with noise "ddim", or `Jumps`, which tells the student s. Times of other numbers
    of calls are spaced alike."""
    calls: tuple[int, int] | None = None
    """The least and the largest K of the targets; None: the sampler's and twice that, 1 for 1."""
    steps: int = 24
    """Steps of the solver's ladder (published: 250)."""
    window: float | None = None
    """How far below m targets may be, as a share of the ladder; None: 1.04 over the least K."""
    rho: float = 0.3
    """How far below a target s may be, as a share of it."""
    order: Literal[1, 2] = 1
    """Order of the teacher's solver: 1 is DDIM, 2 Heun's method."""
    c: float = 0.001
    """Size of an element's error at which the loss turns from a square to a modulus."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student, as
    published."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none (published: 4.5)."""
    drop: float = 0.0
    """Share of samples without their condition (published: 0.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        require_path_of_calls(self, self.sampler)
        if self.steps < 1 or self.c <= 0:
            raise ValueError(f"TDD needs steps >= 1 and c > 0, got {self.steps} and {self.c:g}")
        low, high = self.counts
        if not 1 <= low <= high:
            raise ValueError(f"TDD.calls is two numbers of 1 or more in order, got {self.calls}")
        if not (0 <= self.reach <= 1 and 0 <= self.rho < 1 and 0 <= self.drop < 1):
            raise ValueError(
                "TDD.window, rho and drop are shares, the last two below 1; got "
                f"{self.reach:g}, {self.rho:g} and {self.drop:g}"
            )

    @property
    def counts(self) -> tuple[int, int]:
        """The least and the largest K of the targets: `calls`, or what the sampler means."""
        own = self.sampler.calls
        return self.calls or (own, 2 * own if own > 1 else 1)

    @property
    def reach(self) -> float:
        """How far below m targets may be: `window`, or a little over a call of the least K."""
        return min(1.0, 1.04 / self.counts[0]) if self.window is None else self.window

    def result(self, model: Model) -> Model:
        """`model`, with a second time where the sampler tells it."""
        return model_with(model, "s") if tells_end(self.sampler) else model

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that is told s if the sampler does; its target."""
        return with_target(net_with(net, "s") if tells_end(self.sampler) else net, self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's states at s, from both points of a teacher's step.

        Args:
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        at, told = self.pair(teacher.path, batch), self.told(batch)
        named = told_end(self.sampler, at.s)
        kappa: Scale = self.kappa if told is None else self.kappa * told
        own: Scale = 1.0 if told is None else told
        prediction, target = both_ends(nets, teacher, at, kappa, self.order, named, own)
        return huber_loss(prediction, target, self.c)

    def told(self, batch: Batch) -> Tensor | None:
        """1 for each sample that keeps its condition, 0 for the others; None: all do."""
        if not self.drop:
            return None
        return (need_draws(batch).uniform("drop") >= self.drop).to(need_data(self, batch))

    def targets(self) -> list[float]:
        """Where calls lead, as shares of the ladder, from 0 up."""
        low, high = self.counts
        return sorted(
            float(k) for k in {Fraction(k, n) for n in range(low, high + 1) for k in range(n)}
        )

    def pair(self, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time t of the solver, the time u below it, and s by a target."""
        x0, draws = need_data(self, batch), need_draws(batch)
        n = draws.integers("t", self.steps)
        t, u = (self.time(path, (n + k).to(x0) / self.steps) for k in (1, 0))
        targets = constant(self.targets(), x0)
        lower = n.to(x0) / self.steps + 1e-6
        last = torch.searchsorted(targets, lower) - 1
        first = torch.searchsorted(targets, targets[last] - self.reach - 1e-6)
        share = draws.uniform("target").to(x0)
        chosen = first + (share * (last - first + 1)).long().minimum(last - first)
        s = self.time(path, targets[chosen]) * (1 - self.rho * draws.uniform("s").to(x0))
        s = (s.floor() if isinstance(path, VP) else s).clamp(min=path.t_min).minimum(u)
        return Pair(noised(path, x0, t, draws), t, u, s, batch.cond)

    def time(self, path: NoisePath, share: Tensor) -> Tensor:
        """The time at a share of the sampler's way, 1 for its first call."""
        assert isinstance(self.sampler, FewStep | Jumps)
        return Ancestral(self.sampler.t_init, 1, self.sampler.rho).at(path, share)
