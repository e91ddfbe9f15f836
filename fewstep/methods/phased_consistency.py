"""Phased consistency (Wang et al. 2024), and segments that merge (Hyper-SD, Ren et al. 2024).

https://arxiv.org/abs/2405.18407 and https://arxiv.org/abs/2404.13686. A consistency model that is
sampled in several calls adds noise anew after each, and so forgets where it was. Here the
trajectory is cut into phases at t_1 > ... > t_K > t_(K+1), the end, which are the times that the
student of K calls is sampled at, and in each phase there is a consistency function of its own,
which ends where the phase does. Sampling is deterministic then, and each call has a short way.
With x_u one step of the guided teacher from x_t, and s the end of the phase of t,

    L = E d(X(x_t, t, s), X^-(x_u, u, s)),    d(y) = mean_i (y_i^2 + c^2)^(1/2) - c

(PCM, section 3.1), X being `path.ddim` of the student's prediction, which needs no input for s.
On the fixed point a call is the product of the teacher's steps in its phase. A time between two
phases belongs to the one below it.

Trajectory segmented consistency distillation (Hyper-SD, section 3.1) differs in two choices. It
begins with many phases and goes on with fewer, from the same weights (`phases=(8, 4)`), so that
long jumps are learnt from short ones. And s is any time from u down to the end of the phase: say
so by a sampler `Jumps`, which tells the student s. Hyper-SD's students are not told.

The times of the solver are `steps` in a phase, spaced as the sampler spaces its calls. On
timesteps phases end at 249, 499 and 749 for K = 4, where PCM's 50 DDIM times make 239, 499 and
739. The adversarial losses, and Hyper-SD's feedback and score distillation, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.flow_maps import (
    Pair,
    both_ends,
    follow,
    huber_loss,
    noised,
    require_decay,
    require_path_of_calls,
    tells_end,
    times_of_calls,
    told_end,
    with_target,
)
from fewstep.distillation.method import (
    Loss,
    Method,
    Nets,
    Product,
    Step,
    Turn,
    need_data,
    need_draws,
)
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.distillation.stages import Stage


@dataclass(frozen=True)
class PhasedConsistency(Method):
    """Phased consistency: one update of a student that is consistent within each phase.

    It needs a teacher and data. ValueError for values out of range. Wang et al. 2024,
    https://arxiv.org/abs/2405.18407.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(2.5, 4, "ddim", 2.0)
    """How the finished net generates; its calls make the phases: a `FewStep` with noise "ddim", or
    `Jumps`, where s is any time of the phase."""
    phases: tuple[int, ...] = ()
    """Numbers of phases, the sampler's calls at last; (): these alone (Hyper-SD: 8, 4, 2, 1)."""
    stage_steps: int = 450
    """Training steps with one number of phases, the last of which does not end."""
    steps: int = 12
    """Steps of the teacher's solver in a phase."""
    order: Literal[1, 2] = 1
    """Order of the teacher's solver: 1 is DDIM, 2 Heun's method."""
    c: float = 0.001
    """Size of an element's error at which the loss turns from a square to a modulus."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step, as Hyper-SD has one; 0: it is the
    student (PCM)."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none (published: 5 to 6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        require_path_of_calls(self, self.sampler)
        if self.steps < 1 or self.stage_steps < 1 or self.c <= 0:
            raise ValueError(
                "PhasedConsistency needs steps and stage_steps of 1 or more and c > 0, got "
                f"{self.steps}, {self.stage_steps} and {self.c:g}"
            )
        numbers = self.numbers
        if numbers[-1] != self.sampler.calls or list(numbers) != sorted(numbers, reverse=True):
            raise ValueError(
                f"PhasedConsistency.phases fall to the {self.sampler.calls} calls of the sampler, "
                f"such as ({2 * self.sampler.calls}, {self.sampler.calls}); got {self.phases}"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of phases of each stage."""
        return self.phases or (self.sampler.calls,)

    def result(self, model: Model) -> Model:
        """`model`, with a second time where the sampler tells it."""
        return model_with(model, "s") if tells_end(self.sampler) else model

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that is told s if the sampler does; target and stage."""
        nets = with_target(net_with(net, "s") if tells_end(self.sampler) else net, self.decay)
        if len(self.numbers) > 1:
            nets["stage"] = Stage().to(device_of(net))
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on the phases of the step's stage."""
        return (Turn("student", partial(self.student_loss, self.numbers[self.stage(step)])),)

    def stage(self, step: int) -> int:
        """The stage of a step, both from 0."""
        return min(step // self.stage_steps, len(self.numbers) - 1)

    def after_step(self, step: Step) -> None:
        """The target follows the student; a stage begins with a new optimiser."""
        follow(step, self.decay)
        if "stage" not in step.nets:
            return
        present: Any = step.nets["stage"]
        present.number.fill_(self.stage(step.step))
        if self.stage(step.step + 1) > self.stage(step.step):
            step.restart("student")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The student in as many calls as the stage has phases that it was last trained in."""
        number = self.numbers[-1]
        if "stage" in nets:
            present: Any = nets["stage"]
            number = self.numbers[int(present.number)]
        return Product(average, self.sampler_of(number))

    def sampler_of(self, number: int) -> FewStep | Jumps:
        """The sampler of so many calls."""
        assert isinstance(self.sampler, FewStep | Jumps)
        return replace(self.sampler, steps=number)

    def student_loss(self, number: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's states at s, from both points of a teacher's step.

        Args:
            number: of phases.
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        at = self.pair(number, teacher.path, batch)
        named = told_end(self.sampler, at.s)
        prediction, target = both_ends(nets, teacher, at, self.kappa, self.order, named)
        return huber_loss(prediction, target, self.c)

    def pair(self, number: int, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time t of the solver, the time u below it, and s in the phase."""
        x0, draws = need_data(self, batch), need_draws(batch)
        fine, edges = (
            constant(times_of_calls(self.sampler_of(count), path), x0)
            for count in (number * self.steps, number)
        )
        n = 1 + draws.integers("t", len(fine) - 1)
        t, u = fine[n], fine[n - 1]
        s = edges[torch.bucketize(t, edges) - 1]
        if tells_end(self.sampler):
            low = torch.searchsorted(fine, s)
            s = fine[low + (draws.uniform("s") * (n - low)).long().minimum(n - low - 1)]
        return Pair(noised(path, x0, t, draws), t, u, s, batch.cond)
