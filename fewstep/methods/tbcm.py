"""TBCM, trajectory-backward consistency models: sCM without pictures (Tang et al. 2025).

The points that a continuous-time consistency model is trained at are those of the teacher's own
trajectories, from noise down, in place of noised data: no data are needed, the student meets at
training what it meets at sampling, and the velocity of each point is known from the step that was
made there (https://arxiv.org/abs/2511.20410). On a ladder t_N > ... > t_0, t_N = T, one time is
drawn between any two neighbours, and the teacher steps from each to the next,

    u_k ~ U[t_(N-k), t_(N-k+1)],    x_k = ddim(x_(k-1), f(x_(k-1), u_(k-1)), u_(k-1), u_k),

k = 1 .. N and u_0 = T, from pure noise x_0 by the teacher's prediction f. All states but the
first, N of each noise, make one batch of sCM's loss (`fewstep.distillation.angular_tangent`),

    L = E e^-u_k |F - F^- - g / (|g| + c)|^2 / (s_d tan theta),

g the tangent of warm-up r; the first has no part in it, since where it is pure noise its weight is
zero. At r = 1 the fixed point is the teacher's consistency function; as released, r may come down
again at the end, which is left out. e^u_k is the running mean of the loss in interval k, where the
paper learns u.

The states have the law of noised data up to the solver's error: on a Gaussian of variance 1/4
their variance is off by at most 12 % in 20 steps, and 5.6 % in 50. As released all samples of a
batch have the same times; here each draws its own. Left out is the filter of black pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import perturb
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of, select_rows
from fewstep.distillation.angular_tangent import Levels, Point, follow, tangent, tangent_loss
from fewstep.distillation.flow_maps import Ladder, start_of, warmed_up
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws


@dataclass(frozen=True)
class TBCM(Method):
    """TBCM: one update of a student that is constant along the teacher's own trajectories.

    It needs a teacher and no data; a batch of noises is one of as many samples for each step of
    the ladder. ValueError for values out of range. Tang et al.
    2025, https://arxiv.org/abs/2511.20410.
    """

    sampler: Sampler = FewStep(10.0)
    """How the finished net generates; it starts where the trajectories do."""
    ladder: Ladder = Ladder(16)
    """The times between which states are drawn, up to the sampler's first."""
    sigma_data: float = 0.5
    """Standard deviation of the data, s_d."""
    warmup: int = 200
    """Steps in which r goes from 0 to 1."""
    c: float = 0.1
    """c of g / (|g| + c), which bounds the push, |g| being a norm over a sample; above 0."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    derivative: Literal["forward", "difference"] = "forward"
    """How df/dtheta is taken; "difference" where a network has no forward mode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data <= 0 or self.warmup < 0 or self.c <= 0:
            raise ValueError(
                "TBCM needs sigma_data > 0, warmup >= 0 and c > 0, got "
                f"{self.sigma_data:g}, {self.warmup} and {self.c:g}"
            )

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net`, and the size of its loss by "level", the interval."""
        levels = Levels(self.ladder.steps).to(device_of(net))
        return Nets({"student": deepcopy(net), "level": levels})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, at the step's r."""
        r = warmed_up(step, self.warmup)
        return (Turn("student", partial(self.student_loss, r)),)

    def after_step(self, step: Step) -> None:
        """The loss's means follow those of the step."""
        follow(step)

    def student_loss(self, r: float, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """sCM's loss at the states of the teacher's trajectories.

        Args:
            r: of the warm-up.
            nets: the "student", and the sizes of its loss by "level".
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws.

        Returns: the mean over the states; logs "tangent", the mean |g|; sums "count" and "total".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        at, index = self.states(teacher, batch)
        g = tangent(nets["student"], at, self.sigma_data, r, self.derivative)
        return tangent_loss(nets, at, g, index, self.sigma_data, self.c)

    @torch.no_grad()
    def states(self, teacher: Denoiser, batch: Batch) -> tuple[Point, Tensor]:
        """The states of all trajectories, but for the first, and their intervals (B N,).

        Those of one interval stand together, from the noise down.
        """
        path, draws, z = teacher.path, need_draws(batch), batch.z

        def predict(xt: Tensor, t: Tensor) -> Tensor:
            return guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]

        times = self.ladder.times(path, start_of(self.sampler, path))[::-1]
        t = z.new_full((len(z),), times[0])
        xt = perturb(path, torch.zeros_like(z), z, t)
        f, found = predict(xt, t), []
        for k, (high, low) in enumerate(pairwise(times)):
            then = low + draws.uniform(f"t{k}").to(z) * (high - low)
            xt, t = path.ddim(xt, f, t, then), then
            f = predict(xt, t)
            found.append((xt, t, f))
        states, ts, predictions = (torch.cat(parts) for parts in zip(*found, strict=True))
        rows = torch.arange(len(z), device=z.device).repeat(len(found))
        cond = select_rows(batch.cond, rows)
        index = torch.arange(len(found), device=z.device).repeat_interleave(len(z))
        return Point(states, ts, cond, predictions), index
