"""Imagine Flash: backward distillation, with a shifted reconstruction (Kohler et al. 2024).

A student that is trained at noised data finds the data's own signal in its input; when it samples,
there is none but its own (https://arxiv.org/abs/2405.05224). So it is trained where it will be
called: at the states of its own rollout from noise, which carry no gradient. At the input x_t of a
call it says x, and what it should have said the teacher shows by going on from there,

    L = E |x - sg Phi(x_t, t)|^2                                       backward distillation

Phi(x_t, t) being where the teacher's probability flow from x_t ends, in `steps` steps of a solver.
With `shift` the teacher is given the student's answer in place of its input, with fresh noise,

    L = E |x - sg Phi(alpha_t' x + sigma_t' eps, t')|^2,               shifted reconstruction
    tau' = tau (tau / tau_T)^shift,    tau = sigma / (alpha + sigma),

where t' is near t at the start, for structure, and near 0 at the end, for detail. The paper's text
was not at hand: its function t'(t), its number of teacher steps and further losses are not known
here.

They have different fixed points. The first is zero at the teacher's consistency function, from
whatever states. The second is not: the noise is not the student's, so for N(mu, lambda) the mean
target is mu + alpha_t' (lambda / (alpha_t'^2 lambda + sigma_t'^2))^(1/2) (x - mu), nearer to the
mean than x for every t' > 0, and a student that is trained to the end of it makes the mean alone.
It polishes a student, in few updates; `shift` None, the default, is backward distillation alone.

What is learned is where the flow ends, not what lies between. So calls after the first begin with
fresh noise on the answer, which makes the law that the next one should find. A "ddim" step from
an exact answer goes along a chord of the flow and leaves that law: of N(0, 1/4) it makes samples
of spread 0.73 in four calls from 10, spaced by rho 3.

The paper's third part, noise correction, is for networks that predict the noise, which at pure
noise is their input; denoisers, as they all are here, predict x_0 there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import perturb
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.fake_score import Matching, Rollout
from fewstep.distillation.flow_maps import flow_end, start_of
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.losses.score import denoising


@dataclass(frozen=True)
class ImagineFlash(Method):
    """Imagine Flash: one update of a student at a state of its own rollout.

    Its sampler renoises with fresh noise by default, as "ddim" steps with exact answers make
    samples too far apart. It needs a teacher and no data. ValueError for values out of range.
    Kohler et al. 2024, https://arxiv.org/abs/2405.05224.
    """

    sampler: Sampler = FewStep(10.0, 3, rho=3.0)
    """Its calls are those that are trained; the paper has one to three."""
    shift: float | None = None
    """Exponent of the time t' of the shifted reconstruction; None: backward distillation alone."""
    steps: int = 4
    """Steps of the teacher's solver, even in flow time; 0: its prediction in one call."""
    order: Literal[1, 2] = 2
    """Order of the teacher's solver: 2 is Heun's method, 1 DDIM."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""
    matching: Matching = "uniform"
    """Which calls are trained: each in turn, or the "final" one alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"ImagineFlash.shift is 0 or more, or None; got {self.shift:g}")
        if self.steps < 0:
            raise ValueError(f"ImagineFlash.steps is 0 or more, got {self.steps}")
        if self.steps == 0 and self.shift is None:
            raise ValueError(
                "with steps=0 the target at the student's own state is the teacher's prediction, "
                "which is what the student starts with; give it steps, or a shift"
            )

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student alone: a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, at one call of its rollout."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        return (Turn("student", partial(self.student_loss, rollout)),)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The distance of the student's answer from the teacher's.

        Args:
            rollout: which call.
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        state = rollout.state(nets, batch)
        return Loss(denoising(state.x0, self.target(teacher, state, batch)).mean())

    @torch.no_grad()
    def target(self, teacher: Denoiser, state: State, batch: Batch) -> Tensor:
        """Phi: (B, *), the teacher's end from the state, or from the answer with noise."""
        path, xt, t = teacher.path, state.xt, state.t
        if self.shift is not None:
            tau = path.flow_time(t)
            start = path.flow_time(torch.full_like(t, start_of(self.sampler, path)))
            t = path.time_of(tau * (tau / start) ** self.shift)
            eps = need_draws(batch).normal("eps", xt.shape[1:]).to(xt)
            xt = perturb(path, state.x0, eps, t)
        if self.steps:
            end = torch.full_like(t, path.t_min)
            xt = flow_end(teacher, xt, t, end, batch.cond, self.kappa, self.steps, self.order)
            t = end
        return guided(teacher, xt, t, batch.cond, [self.kappa]).predictions[0]
