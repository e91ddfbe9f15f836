"""Consistency trajectory models (Kim et al. 2023), https://arxiv.org/abs/2310.02279.

A consistency model knows one jump from each point of a trajectory, to its end. This student is
told a second time and jumps to any: G(x_t, t, s) = A x_t + B g(x_t, t, s), with g a prediction of
x_0 (equation 5 on a VE path, `fewstep.distillation.flow_maps` on any). With x_u some steps of the
teacher's solver from x_t and s <= u < t, all three drawn from one ladder (equation 8),

    L = E w d(G^-(G(x_t, t, s), s, 0), G^-(G^-(x_u, u, s), s, 0)) + c E w' |g(x_r, r, r) - x_0|^2.

Both sides are carried from s to the data by G^-, an average of the student that has no gradient of
its own, so that d compares pictures and not noise. One number of solver steps, up to `most`, is
drawn for a training step: a long way makes targets right, a short one makes them cheap. The second
term is score matching on noised data x_r (equation 11): at s = t, where the first says nothing, g
is the denoiser. On the fixed point of the first term G is the product of the solver's steps.

With `compare="state"`, `most=1`, `order=1` and c = 0 this is trajectory consistency distillation
(Zheng et al. 2024, https://arxiv.org/abs/2402.19159), which compares the states at s themselves.

The paper's d is LPIPS, and its c makes the gradients of both terms equal in the network's last
layer, where here it is a number. Its adversarial term is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, coefficients, same_shape
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Ladder,
    follow,
    jump,
    noised,
    require_decay,
    require_jumps,
    solve_along,
    start_of,
    times_of_levels,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.distance import Distance, SquaredL2, rms_distance
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Power, Weight


class Course(NamedTuple):
    """Where a solver goes: x_t (B, *), its times from t to u (B, N + 1), s and the end (B,)."""

    xt: Tensor
    times: Tensor
    s: Tensor
    end: Tensor


@dataclass(frozen=True)
class CTM(Method):
    """Consistency trajectory model: one update of a student that jumps between any two times.

    The ladder and the solver are those of CIFAR-10. It needs a teacher and data. ValueError for
    values out of range. Kim et al. 2023, https://arxiv.org/abs/2310.02279.
    """

    needs_data: ClassVar[bool] = True
    of_levels: ClassVar[frozenset[str]] = frozenset({"times"})

    sampler: Sampler = Jumps(2.5)
    ladder: Ladder = Ladder(17)
    """The times t, u and s, up to the sampler's first; 18 of them, as for CIFAR-10."""
    most: int = 4
    """The largest number of solver steps from t to u (published: 17, all of the ladder)."""
    order: Literal[1, 2] = 2
    """Order of the teacher's solver: 2 is Heun's method, 1 DDIM."""
    compare: Literal["data", "state"] = "data"
    """What d compares: both sides carried to the data, or the states at s."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step (published: 0.999)."""
    distance: Distance = SquaredL2()
    """d, of differences over the root of a sample's dimension: by default the mean square."""
    weight: Weight = Power()
    """w, the weight of the consistency loss at t."""
    denoising: float = 0.1
    """c, the weight of score matching; 0: none."""
    times: TimeLaw = LogNormal()
    """The law of the noise level sigma / alpha in score matching, as EDM has it."""
    denoising_weight: Weight = EDMWeight()
    """w', the weight of score matching by noise level."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        require_jumps(self, self.sampler)
        if self.most < 1 or self.denoising < 0:
            raise ValueError(
                f"CTM needs most >= 1 and denoising >= 0, got {self.most} and {self.denoising:g}"
            )
        if self.compare == "data" and self.decay == 0:
            raise ValueError(
                "CTM carries both sides to the data by an average of the student: decay is above "
                "0, or compare is 'state'"
            )
        if self.denoising and self.kappa != 1:
            raise ValueError(
                "CTM's score matching learns the denoiser without guidance: with kappa other than "
                "1 say denoising=0.0"
            )

    def result(self, model: Model) -> Model:
        """`model` with a second time."""
        return model_with(model, "s")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that is told s but does not hear it yet; its target."""
        return with_target(net_with(net, "s"), self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, with the step's number of solver steps."""
        count = 1 + int(Draws(torch.tensor([step])).integers("solver", self.most))
        return (Turn("student", partial(self.student_loss, count)),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, count: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the jumps to s, from t and from u, and score matching.

        Args:
            count: the number of solver steps from t to u.
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference, and
        "denoising".

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        at = self.course(count, teacher.path, batch)
        made, goal = self.sides(nets, teacher, at, batch)
        same_shape(prediction=made, x0=goal)
        apart = made - goal
        weight = self.weight(made, goal, *coefficients(teacher.path, at.xt, at.times[:, 0]))
        loss = (weight.flatten() * rms_distance(self.distance, apart)).mean()
        logs = {"error": (apart.detach() ** 2).mean()}
        if not self.denoising:
            return Loss(loss, logs)
        matched = self.score_matching(nets["student"], batch)
        return Loss(loss + self.denoising * matched, {**logs, "denoising": matched})

    def course(self, count: int, path: NoisePath, batch: Batch) -> Course:
        """Noised data at a random time of the ladder that has `count` steps below it, and s."""
        x0, draws = need_data(self, batch), need_draws(batch)
        ladder = constant(self.ladder.times(path, start_of(self.sampler, path)), x0)
        count = min(count, len(ladder) - 1)
        n = count + draws.integers("t", len(ladder) - count)
        times = ladder[n[:, None] - torch.arange(count + 1, device=n.device)]
        share = draws.uniform("s")
        below = (share * (n - count + 1)).long().minimum(n - count)
        xt = noised(path, x0, times[:, 0], draws)
        return Course(xt, times, ladder[below], ladder[0].expand_as(times[:, 0]))

    def sides(
        self, nets: Nets, teacher: Denoiser, at: Course, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """What d compares, (B, *) both: with the student's gradient, and without one."""
        average: Any = nets["target"] if "target" in nets else nets["student"]
        t, u, cond, named = at.times[:, 0], at.times[:, -1], batch.cond, {"s": at.s}
        with torch.no_grad():
            xu = solve_along(teacher, at.xt, at.times, cond, self.kappa, self.order)
            goal = jump(average, xu, u, at.s, cond, named)
        made = jump(nets["student"], at.xt, t, at.s, cond, named)
        if self.compare == "state":
            return made, goal
        with torch.no_grad():
            goal = jump(average, goal, at.s, at.end, cond, {"s": at.end})
        return jump(average, made, at.s, at.end, cond, {"s": at.end}), goal

    def score_matching(self, student: Any, batch: Batch) -> Tensor:
        """E w' |g(x_t, t, t) - x_0|^2 on noised data, at a noise and a time of its own."""
        path: NoisePath = student.path
        x0, draws = need_data(self, batch), need_draws(batch).under("denoising")
        start = start_of(self.sampler, path)
        t = times_of_levels(self.times, path, start, draws.uniform("t")).to(x0)
        xt = noised(path, x0, t, draws)
        weight = self.denoising_weight(x0, x0, *coefficients(path, xt, t))
        return denoising(student(xt, t, batch.cond, s=t), x0, weight).mean()
