"""The tangent of continuous-time consistency models, and its loss, on any noise path.

For data of scale s_d let

    theta = arctan(sigma_t / (s_d alpha_t)),    x = s_d x_t / (s_d^2 alpha_t^2 + sigma_t^2)^(1/2),

which is TrigFlow: x = cos theta x_0 + sin theta s_d eps. A student's prediction of the end of the
trajectory is f = cos theta x - sin theta s_d F (there F is the network), and f does not change
along the flow where F is regressed on F^- + cos theta df / dtheta, F^- without a gradient (Lu &
Song 2024, https://arxiv.org/abs/2410.11081, equation 8 and section 4). With v = dx / dtheta of the
teacher and a warm-up r from 0 to 1 this is

    g = -cos^2 theta (s_d F^- - v)
        - r (cos theta sin theta x + s_d cos theta sin theta dF^- / dtheta),
    L = E e^-u(t) |F - F^- - g / (|g| + c)|^2 / (s_d tan theta)        (algorithm 1)

with |g| the norm over a sample. The derivative is the student's own along the flow, by
`fewstep.diffusion.derivative.jvp`. In terms of f and the prediction f_phi of x_0 that is followed
the first part of g is cos^2 theta (f - f_phi) / sin theta, and what r multiplies is
cos theta df / dtheta less that.

Where the paper learns the log-variance u beside the student, here e^u is what that learns: the
running mean of the loss at some noise levels (`Levels`). While r < 1 the fixed point is another
map.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath, expand
from fewstep.diffusion.types import Cond
from fewstep.distillation.flow_maps import along_the_flow, level
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.losses.distance import squared_norm
from fewstep.losses.score import mean_flat


class Levels(nn.Module):
    """The running mean of the loss at each of some noise levels: a buffer; 0 before the first."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(bins))

    def follow(self, count: Tensor, total: Tensor, rate: float) -> None:
        """Take in a step: `rate` of the old means. count, total: (bins,), samples and losses."""
        count, total = count.to(self.mean), total.to(self.mean)
        new = total / count.clamp_min(1)
        kept = torch.where(self.mean > 0, rate, 0.0)
        self.mean.copy_(torch.where(count > 0, torch.lerp(new, self.mean, kept), self.mean))

    def weight(self, index: Tensor) -> Tensor:
        """1 / mean of the levels (B,); 1 where nothing is known."""
        mean = self.mean[index]
        return torch.where(mean > 0, 1 / mean.clamp_min(1e-30), 1.0)


class Point(NamedTuple):
    """Noisy samples x_t (B, *), t (B,), conditions, and f, the prediction that is followed."""

    xt: Tensor
    t: Tensor
    cond: Cond
    f: Tensor


def angle(path: NoisePath, at: Point, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """cos theta, sin theta and dtheta/dt, each (B, 1, ..., 1)."""

    def theta(t: Tensor) -> Tensor:
        return torch.atan2(path.sigma(t), sigma_data * path.alpha(t))

    angle, speed = torch.func.jvp(theta, (at.t,), (torch.ones_like(at.t),))  # type: ignore[misc]
    angle, speed = expand(angle, at.xt), expand(speed, at.xt)
    return angle.cos(), angle.sin(), speed


@torch.no_grad()
def tangent(
    student: Any, at: Point, sigma_data: float, r: float, how: Literal["forward", "difference"]
) -> Tensor:
    """g before it is normalised: (B, *)."""
    cosine, sine, speed = angle(student.path, at, sigma_data)
    value, rate = along_the_flow(student, at.xt, at.t, at.f, at.cond, how)
    first = cosine**2 * (value - at.f) / sine
    return first + r * (cosine * rate / speed - first)


def tangent_loss(
    nets: Nets, at: Point, g: Tensor, index: Tensor, sigma_data: float, c: float
) -> Loss:
    """The regression of F on F^- + g / (|g| + c).

    Args:
        nets: the "student", and the sizes of its loss by "level", `Levels`, if there are any.
        at: where it is trained.
        g: (B, *), the tangent there.
        index: (B,) int64, the level of each sample.
        sigma_data: s_d.
        c: of the normalisation.

    Returns: the mean over samples; logs "tangent", the mean |g|; with levels the sums "count" and
    "total" of each, for `Levels.follow`.
    """
    student: Any = nets["student"]
    size = squared_norm(g).sqrt()
    _, sine, _ = angle(student.path, at, sigma_data)
    f = student(at.xt, at.t, at.cond)
    apart = (f.detach() - f) / (sigma_data * sine) - g / (size + c)
    loss = mean_flat(apart**2) / level(student.path, at.t).to(apart)
    logs = {"tangent": size.mean()}
    if "level" not in nets:
        return Loss(loss.mean(), logs)
    levels: Any = nets["level"]
    found = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
    zero = found.new_zeros(len(levels.mean))
    sums = {
        "count": zero.index_add(0, index, torch.ones_like(found)),
        "total": zero.index_add(0, index, found),
    }
    return Loss((levels.weight(index).to(loss) * loss).mean(), logs, sums)


def follow(step: Step) -> None:
    """nets["level"] take in the step's losses, if they are told of in its sums."""
    if "count" in step.sums:
        levels: Any = step.nets["level"]
        levels.follow(step.sums["count"], step.sums["total"], 0.95)
