"""Consistency training without a teacher: iCT (Song & Dhariwal 2023) and ECT (Geng et al. 2024).

https://arxiv.org/abs/2310.14189 and https://arxiv.org/abs/2406.14548. Where consistency
distillation steps along a teacher's flow, this steps along the line through a datum and its own
noise, which in expectation is the same direction,

    L = E w d(f(x_t), f^-(x_r)),
    x_t = alpha_t x_0 + sigma_t eps,    x_r = alpha_r x_0 + sigma_r eps,

with the same x_0 and eps. f is the student's prediction of x_0 and f^- the student itself without
a gradient, with the same units dropped out (iCT, section 3.2). In noise levels sigma / alpha,
which are t and r of the papers, t is drawn from `times` and

    r(t) = t [1 - q^-(j+1) (1 + k sigmoid(-b t))]_+        (ECT, section 4.1)

at stage j of training, which is a pure function of the step. At r = 0 the target is x_0: the first
stage is nearly diffusion training, from which a pretrained model starts, and later ones close the
gap. w is 1 / (t - r), and d iCT's pseudo-Huber distance, (|y|^2 + c^2)^(1/2) - c with
c = 0.00054 D^(1/2), which in root mean squares is 0.00054 for samples of any size.

With the squared distance the fixed point on a Gaussian is that of consistency distillation with
Euler's method, but the loss is not zero there: x_r given x_t is not one point. Other distances
then favour other minima, the less the larger D is.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath, coefficients, expand, perturb, same_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import level, start_of, target_of, time_of_level
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.losses.distance import Distance, PseudoHuber, rms_distance
from fewstep.losses.weight import Power, Weight


@dataclass(frozen=True)
class ConsistencyTraining(Method):
    """Consistency training: one update of a student on pairs of noise levels that close up.

    The defaults are ECT's for CIFAR-10 with iCT's distance, in fewer steps. It needs data; the
    teacher is where the student starts. ValueError for values out of range. Geng et al. 2024,
    https://arxiv.org/abs/2406.14548.
    """

    needs_data: ClassVar[bool] = True
    of_levels: ClassVar[frozenset[str]] = frozenset({"times"})

    sampler: Sampler = FewStep(2.5)
    times: TimeLaw = LogNormal(-1.1, 2.0)
    """The law of the noise level sigma / alpha; what is above the sampler's start is set to it."""
    q: float = 2.0
    """The ratio 1 - r / t falls by this factor in a stage (4 for ImageNet)."""
    k: float = 8.0
    """How much wider the gap is at small t than at large."""
    b: float = 1.0
    """Where it widens: around t = 1 / b."""
    stages: int = 8
    """Number of stages; from each to the next the noise levels of a pair close up."""
    stage_steps: int = 200
    """Training steps of a stage, the last of which does not end (published: 25,000)."""
    distance: Distance = PseudoHuber(0.00054)
    """d, of differences over the root of a sample's dimension."""
    weight: Weight = Power()
    """A factor beside 1 / (t - r)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q <= 1 or self.k < 0 or self.b < 0 or self.stages < 1 or self.stage_steps < 1:
            raise ValueError(
                "ConsistencyTraining needs q > 1, k >= 0, b >= 0, and stages and stage_steps of "
                f"at least 1, got {self}"
            )

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student at the step's stage."""
        return (Turn("student", partial(self.student_loss, self.stage(step))),)

    def stage(self, step: int) -> int:
        """The stage of a step, both from 0."""
        return min(step // self.stage_steps, self.stages - 1)

    def gap(self, t: Tensor, stage: int) -> Tensor:
        """t - r(t) at a stage, of noise levels: any shape -> the same shape."""
        share = self.q ** -(stage + 1) * (1 + self.k * (-self.b * t).sigmoid())
        return t * share.clamp(max=1)

    def student_loss(self, stage: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's predictions at two levels of the same noise.

        Args:
            stage: of the schedule of r, from 0.
            nets: the "student".
            teacher: not used.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws.
        """
        student: Any = nets["student"]
        path: NoisePath = student.path
        x0, draws = need_data(self, batch), need_draws(batch)
        eps = draws.normal("eps", x0.shape[1:]).to(x0)
        levels = self.times.quantile(draws.uniform("t"))
        t, r, gap, known = self.pair(path, levels, stage)
        t, r, gap = t.to(x0), r.to(x0), gap.to(x0)
        xt, xr = perturb(path, x0, eps, t), perturb(path, x0, eps, r)
        with target_of(nets) as net:
            target = net(xr, r, batch.cond)
            same_shape(prediction=target, x0=x0)
            target = torch.where(expand(known, x0), x0, target)
        prediction = student(xt, t, batch.cond)
        apart = prediction - target
        weight = self.weight(x0, target, *coefficients(path, xt, t)).flatten() / gap
        loss = weight * rms_distance(self.distance, apart)
        return Loss(loss.mean(), {"error": (apart.detach() ** 2).mean()})

    def pair(
        self, path: NoisePath, levels: Tensor, stage: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Times t and r, t - r as noise levels, and whether r is no higher than the path's end.

        levels: (B,), of t; r is the end where it would be below. Returns (B,) each.
        """
        start = levels.new_full((), start_of(self.sampler, path))
        t = torch.minimum(time_of_level(path, levels), start)
        gap = self.gap(level(path, t), stage)
        below = level(path, t) - gap
        return t, time_of_level(path, below), gap, below <= level(path, t.new_full((), path.t_min))
