"""SLAM, the sub-path linear approximation model (Xu et al. 2024).

Consistency distillation in which the student learns whole steps of the teacher's trajectory, in
place of their ends (https://arxiv.org/abs/2404.13903). Between x_t and x_u, where the teacher's
DDIM step from t leads, u < t the time below it on a ladder, lie the points

    x_gamma = gamma x_t + (1 - gamma) (alpha_t / alpha_u) x_u,    gamma ~ U[0, 1],

all with the signal alpha_t x_0, and with noise between. From each the student's end of the
trajectory is that of x_u,

    L = E d(X(x_gamma, t, s; gamma), X^-(x_u, u, s; 1)),    d(y) = mean_i (y_i^2 + c^2)^(1/2) - c,

with s the end of the path, X^- an average of the student, and gamma an input of the student, which
is 1 where it is sampled. At gamma = 1 this is LCM's loss; as gamma falls, an easier one, 0 at the
lowest step by itself. The prediction g of x_0 at (x_gamma, t) is read as one of noise,
eps = (x_gamma - alpha_t g) / sigma_t, and x_0 follows with the noise that there is,

    X = alpha_s x_0 + (sigma_s / sigma_gamma) (x_gamma - alpha_t x_0),
    x_0 = (x_gamma - sigma_gamma eps) / alpha_t.

Along a step of DDIM both ends have one eps, so that sigma_gamma is on the line between sigma_t
and (alpha_t / alpha_u) sigma_u (`noise` "shared"). The released code adds what is between them as
if it were noise of its own ("independent"),

    sigma_gamma^2 = (alpha_t sigma_u / alpha_u)^2
        + gamma^2 (sigma_t^2 - (alpha_t sigma_u / alpha_u)^2).

At the ends the two agree. Since x_0 is divided by alpha_t, the ladder must start where there is a
signal. The student is told gamma by name, where the paper told it 10 - 10 gamma in the place of
LCM's guidance scale, which is fixed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, coefficients, expand, same_shape
from fewstep.diffusion.samplers import PURE_NOISE, FewStep, WithInput
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Ladder,
    Pair,
    follow,
    huber_loss,
    jump,
    pair_on,
    require_decay,
    solve,
    start_of,
    target_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.named_inputs import model_with, net_with


class Between(NamedTuple):
    """x_gamma (B, *), gamma (B,), and sigma_gamma (B, 1, ..., 1)."""

    x: Tensor
    gamma: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class SLAM(Method):
    """SLAM: one update of a student that is told where it is on a step of the teacher.

    It needs a teacher and data. ValueError for values out of range. Xu et al. 2024,
    https://arxiv.org/abs/2404.13903.
    """

    needs_data: ClassVar[bool] = True
    needs_signal: ClassVar[bool] = True

    sampler: Sampler = WithInput(FewStep(10.0, 4, rho=3.0), "gamma", 1.0)
    """How the finished net generates; its input gamma is 1, a point of the trajectory itself."""
    ladder: Ladder = Ladder(48)
    """The times of the teacher's steps, up to the sampler's first (published: 50 steps)."""
    noise: Literal["shared", "independent"] = "shared"
    """Noise of the points between: on the line ("shared"), or as released ("independent")."""
    c: float = 0.001
    """Size of an element's error at which the loss turns from a square to a modulus."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if self.c <= 0:
            raise ValueError(f"SLAM.c is positive, got {self.c:g}")

    def result(self, model: Model) -> Model:
        """`model` that is told gamma."""
        return model_with(model, "gamma")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that is told gamma but does not hear it yet; its target."""
        return with_target(net_with(net, "gamma"), self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's ends of one trajectory.

        Args:
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws, where guidance meets no conditions,
        and where there is no signal at the ladder's last time.
        """
        at = self.pair(teacher.path, batch)
        with target_of(nets) as net:
            xu = solve(teacher, at.xt, at.t, at.u, at.cond, self.kappa, 1)
            target = jump(net, xu, at.u, at.s, at.cond, {"gamma": torch.ones_like(at.t)})
        gamma = need_draws(batch).uniform("gamma").to(at.t)
        made = self.end(nets["student"], at, self.between(teacher.path, at, xu, gamma))
        same_shape(prediction=made, x0=target)
        return huber_loss(made, target, self.c)

    def pair(self, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time of the ladder, the time below it, and the ladder's end."""
        times = self.ladder.times(path, start_of(self.sampler, path))
        top = torch.tensor(times[-1], dtype=torch.float64)
        if float(path.alpha(top)) <= PURE_NOISE * float(path.sigma(top)):
            raise ValueError(
                f"SLAM divides by alpha, which is 0 at t = {times[-1]:g} of {path}; start its "
                "sampler a little below"
            )
        return pair_on(self, times, path, batch)

    def between(self, path: NoisePath, at: Pair, xu: Tensor, gamma: Tensor) -> Between:
        """The points on the teacher's steps from x_t to x_u (B, *), at gamma (B,)."""
        (alpha, sigma), (alpha_u, sigma_u) = (coefficients(path, xu, t) for t in (at.t, at.u))
        ratio, share = alpha / alpha_u, expand(gamma, xu)
        x = share * at.xt + (1 - share) * ratio * xu
        low = ratio * sigma_u
        if self.noise == "shared":
            return Between(x, gamma, share * sigma + (1 - share) * low)
        return Between(x, gamma, (low**2 + share**2 * (sigma**2 - low**2)).sqrt())

    def end(self, student: Any, at: Pair, point: Between) -> Tensor:
        """X(x_gamma, t, s; gamma): (B, *), with the student's gradient."""
        path: NoisePath = student.path
        (alpha, sigma), (alpha_s, sigma_s) = (coefficients(path, point.x, t) for t in (at.t, at.s))
        g: Tensor = student(point.x, at.t, at.cond, gamma=point.gamma)
        x0 = (point.x - point.sigma / sigma * (point.x - alpha * g)) / alpha
        return alpha_s * x0 + sigma_s / point.sigma * (point.x - alpha * x0)
