"""Consistency distillation (Song et al. 2023), https://arxiv.org/abs/2303.01469.

A consistency function maps every point of a trajectory of the teacher's probability flow to where
the trajectory ends, so one call makes a sample. On a ladder t_0 < ... < t_N, with x_n one step of
the teacher's solver from x_{n+1},

    L = E w d(f(x_{n+1}, t_{n+1}), f^-(x_n, t_n)),    f(x, t_0) = x        (equation 7)

x_{n+1} being noised data and f^- an average of the student, or the student itself, without a
gradient. Published are both, the latter for CIFAR-10 with LPIPS in 800,000 updates. In a few
hundred updates of a small network at a rate of 1e-3 the student itself runs after its own errors
and ends worse than an undistilled teacher, and so the average is the default (`decay`).

f is the jump to t_0 by the student's prediction g of x_0, A x + B g with A = 1 and B = 0 at t_0
(`fewstep.distillation.flow_maps`), so the boundary condition holds by itself, on any noise path.
On its fixed point f is the product of the solver's steps, not of the exact flow: with Heun's
method 1 % off at 40 levels of a Gaussian.

The paper's d is LPIPS; here it is a distance of x_0, by default the mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fewstep.diffusion.noise_path import NoisePath, coefficients
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Ladder,
    Pair,
    both_ends,
    follow,
    pair_on,
    require_decay,
    start_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn
from fewstep.losses.distance import Distance, SquaredL2, rms_distance
from fewstep.losses.weight import Power, Weight


@dataclass(frozen=True)
class ConsistencyDistillation(Method):
    """Consistency distillation: one update of a student that follows the teacher's solver.

    The defaults are those of CIFAR-10 but for the distance. It needs a teacher and data.
    ValueError for values out of range. Song et al. 2023, https://arxiv.org/abs/2303.01469.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(2.5)
    ladder: Ladder = Ladder(17)
    """The times of the teacher's steps, up to the sampler's first; 18 of them, as for CIFAR-10
    (40 for ImageNet 64)."""
    order: Literal[1, 2] = 2
    """Order of the teacher's solver: 2 is Heun's method, 1 DDIM."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student
    (published: 0.95, or 0)."""
    distance: Distance = SquaredL2()
    """d, of differences over the root of a sample's dimension: by default the mean square."""
    weight: Weight = Power()
    """w, the weight of the loss at t_{n+1}, the larger of its two times."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and its average "target" unless decay is 0."""
        return with_target(net, self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's ends of one trajectory, from t_{n+1} and from t_n.

        Args:
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        at = self.pair(teacher.path, batch)
        prediction, target = both_ends(nets, teacher, at, self.kappa, self.order)
        apart = prediction - target
        weight = self.weight(prediction, target, *coefficients(teacher.path, at.xt, at.t))
        loss = weight.flatten() * rms_distance(self.distance, apart)
        return Loss(loss.mean(), {"error": (apart.detach() ** 2).mean()})

    def pair(self, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time of the ladder, the time below it, and the ladder's end."""
        times = self.ladder.times(path, start_of(self.sampler, path))
        return pair_on(self, times, path, batch)
