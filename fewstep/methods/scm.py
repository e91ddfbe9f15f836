"""sCM, continuous-time consistency models (Lu & Song 2024), https://arxiv.org/abs/2410.11081.

The limit of consistency distillation at infinitely small steps: what the student predicts as the
end of a trajectory should not change along the flow. Its tangent there,

    g = -cos^2 theta (s_d F^- - v)
        - r (cos theta sin theta x + s_d cos theta sin theta dF^- / dtheta),

in TrigFlow's coordinates x and theta of any noise path, is what the network F is moved along,

    L = E e^-u(t) |F - F^- - g / (|g| + c)|^2 / (s_d tan theta)        (algorithm 1)

(`fewstep.distillation.angular_tangent`). The velocity v is the teacher's (sCD), guided by `kappa`,
or that of data and noise (sCT). Where the paper learns the log-variance u beside the student, here
e^u is what that learns: the running mean of the loss at the noise level, in `bins` of equal
probability. While r < 1 the fixed point is another map.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.angular_tangent import Levels, Point, follow, tangent, tangent_loss
from fewstep.distillation.flow_maps import noised, start_of, times_of_levels, warmed_up
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws


@dataclass(frozen=True)
class SCM(Method):
    """sCM: one update of a student that is constant along the teacher's flow.

    The defaults are those of CIFAR-10 but for the length of the warm-up. It needs data, and a
    teacher unless `velocity` is "data". ValueError for values out of range. Lu & Song 2024,
    https://arxiv.org/abs/2410.11081.
    """

    needs_data: ClassVar[bool] = True
    of_levels: ClassVar[frozenset[str]] = frozenset({"times"})

    sampler: Sampler = FewStep(2.5)
    times: TimeLaw = LogNormal(-1.0, 1.4)
    """The law of the noise level sigma / alpha; what is above the sampler's start is set to it."""
    sigma_data: float = 0.5
    """Standard deviation of the data, s_d."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Where the velocity v comes from: the teacher, or the data and their noise."""
    warmup: int = 200
    """Steps in which r goes from 0 to 1 (published: 10,000)."""
    c: float = 0.1
    """c of g / (|g| + c), which bounds the push, |g| being a norm over a sample; above 0."""
    bins: int = 16
    """Noise levels that the loss is brought to one size at; 0: none."""
    kappa: float = 1.0
    """Guidance scale of the teacher's velocity, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How df/dtheta is taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data <= 0 or self.warmup < 0 or self.c <= 0 or self.bins < 0:
            raise ValueError(
                "SCM needs sigma_data > 0, warmup >= 0, c > 0 and bins >= 0, got "
                f"{self.sigma_data:g}, {self.warmup}, {self.c:g} and {self.bins}"
            )
        if self.velocity == "data" and self.kappa != 1:
            raise ValueError("SCM.kappa guides the teacher's velocity, not that of data")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and the size of its loss by "level"."""
        nets = Nets({"student": deepcopy(net)})
        if self.bins:
            nets["level"] = Levels(self.bins).to(device_of(net))
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, at the step's r."""
        r = warmed_up(step, self.warmup)
        return (Turn("student", partial(self.student_loss, r)),)

    def after_step(self, step: Step) -> None:
        """The loss's means follow those of the step."""
        follow(step)

    def student_loss(self, r: float, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The regression of F on F^- + g / (|g| + c).

        Args:
            r: of the warm-up.
            nets: the "student", and the sizes of its loss by "level".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "tangent", the mean |g|; sums "count" and "total".

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        at = self.point(student.path, teacher, batch)
        g = self.tangent(student, at, r)
        share = need_draws(batch).uniform("t")
        index = (share * self.bins).long().clamp(max=max(self.bins - 1, 0))
        return tangent_loss(nets, at, g, index, self.sigma_data, self.c)

    @torch.no_grad()
    def point(self, path: NoisePath, teacher: Denoiser, batch: Batch) -> Point:
        """Noised data at a random time, and the prediction f_phi there."""
        x0, draws = need_data(self, batch), need_draws(batch)
        start = start_of(self.sampler, path)
        t = times_of_levels(self.times, path, start, draws.uniform("t")).to(x0)
        xt = noised(path, x0, t, draws)
        if self.velocity == "data":
            return Point(xt, t, batch.cond, x0)
        f = guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
        return Point(xt, t, batch.cond, f)

    def tangent(self, student: Any, at: Point, r: float) -> Tensor:
        """g before it is normalised: (B, *)."""
        return tangent(student, at, self.sigma_data, r, self.derivative)
