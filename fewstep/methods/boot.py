"""BOOT: distillation without data, by bootstrapping (Gu et al. 2023).

Along the teacher's probability flow from noise z the signal is what remains of x_t without z,

    y_t = (x_t - sigma_t z) / alpha_t,    dy_t/dt = -(ln sigma_t / alpha_t)' (f(x_t, t) - y_t),

f being the teacher's prediction of x_0 (https://arxiv.org/abs/2306.05544, section 3.1): y_T is its
guess at pure noise, y_0 the sample. The student g(z, t) says y_t for every t at once. A step of
the ODE to s < t leads from its own answer at t, without a gradient, to its target at s,

    y_s = y_t + (1 - w) (f(x_t, t) - y_t),    x_t = alpha_t y_t + sigma_t z,
    L = E |g(z, s) - y_s|^2 / (1 - w)^2 + boundary E |g(z, T) - f(x_T, T)|^2,

w = (sigma_s / alpha_s) (alpha_t / sigma_t), and 1 - w is the change of ln sigma / alpha for short
steps (equation 9). All that training needs is noise and the teacher.

Here g is a flow map (`fewstep.diffusion.extra_inputs`) that always starts at x_T and is told where
it goes: `path.ddim(x_T, g, T, s)` is x_s. Where alpha_T = 0 that g is y_s; in general, with
B_t = alpha_t - alpha_T sigma_t / sigma_T,

    x_t = (sigma_t / sigma_T) x_T + B_t y_t,    w = sigma_s B_t / (sigma_t B_s),

so that the noise may end at any T, w is 0 at t = T, and the boundary holds at the start, where the
student is the teacher. The steps are even in flow time, sigma / (alpha + sigma), down to t_min.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, coefficients, expand, perturb, same_shape
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.score import denoising


class Bootstrap(NamedTuple):
    """A step of the signal: noise x_T and T, the time s, y_s (B, *) and 1 - w (B, 1, ..., 1)."""

    xT: Tensor
    T: Tensor
    s: Tensor
    ys: Tensor
    change: Tensor


@dataclass(frozen=True)
class BOOT(Method):
    """BOOT: one update of a student that says the signal at every time.

    It needs a teacher and no data. ValueError for a sampler of several calls, and for numbers out
    of range. Gu et al. 2023, https://arxiv.org/abs/2306.05544.
    """

    sampler: Sampler = Jumps(2.5)
    """A `Jumps` of one call; it starts at T."""
    steps: int = 32
    """The step from t to s is the 1 / steps-th part of the flow time from t_min to T."""
    boundary: float = 1.0
    """Weight of the loss at T."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, Jumps) or self.sampler.calls != 1:
            raise ValueError(f"BOOT.sampler is a Jumps of one call, got {self.sampler}")
        if self.steps < 1 or self.boundary < 0:
            raise ValueError(
                "BOOT needs steps of 1 or more and a boundary of 0 or more, got "
                f"{self.steps} and {self.boundary:g}"
            )

    def result(self, model: Model) -> Model:
        """`model` with a second time."""
        return model_with(model, "s")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with a second time, which it does not hear at first."""
        return Nets({"student": net_with(net, "s")})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The bootstrapped regression, and the boundary.

        Args:
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: its z (B, *), cond and draws are used.

        Returns: the mean over the batch; logs "bootstrap" and "boundary".

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        at = self.bootstrap(student, teacher, batch)
        made = student(at.xT, at.T, batch.cond, s=at.s)
        own = denoising(made, at.ys, at.change**-2).mean()
        if not self.boundary:
            return Loss(own, {"bootstrap": own})
        with torch.no_grad():
            first = guided(teacher, at.xT, at.T, batch.cond, [self.kappa]).predictions[0]
        ends = denoising(student(at.xT, at.T, batch.cond, s=at.T), first).mean()
        return Loss(own + self.boundary * ends, {"bootstrap": own, "boundary": ends})

    @torch.no_grad()
    def bootstrap(self, student: Any, teacher: Denoiser, batch: Batch) -> Bootstrap:
        """A step of the student's own signal from a random time t to s."""
        assert isinstance(self.sampler, Jumps)
        path: NoisePath = teacher.path
        u = need_draws(batch).uniform("t").to(batch.z)
        T = torch.full_like(u, self.sampler.ladder(path)[0])
        low = path.flow_time(torch.full_like(u, path.t_min))
        length = (path.flow_time(T) - low) / self.steps
        tau = low + u * (self.steps - 1) * length
        s, t = path.time_of(tau), path.time_of(tau + length).minimum(T)
        xT = perturb(path, torch.zeros_like(batch.z), batch.z, T)
        yt = student(xT, T, batch.cond, s=t)
        f = guided(teacher, path.ddim(xT, yt, T, t), t, batch.cond, [self.kappa]).predictions[0]
        same_shape(yt=yt, x0=f)
        change = self.change(path, T, t, s)
        ys = yt + expand(change, xT).to(xT) * (f - yt)
        return Bootstrap(xT, T, s, ys, expand(change, xT).to(xT))

    def change(self, path: NoisePath, T: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """1 - w of a step from t to s, in double precision: (B,)."""
        last, now, then = (coefficients(path, u.double(), u.double()) for u in (T, t, s))
        left = then[0] - last[0] * then[1] / last[1]
        return (then[0] - now[0] * then[1] / now[1]) / left
