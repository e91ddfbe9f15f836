"""Progressive distillation (Salimans & Ho 2022), https://arxiv.org/abs/2202.00512.

A student of N deterministic steps learns to make in one step what its teacher makes in two. Then
it is the teacher of a student of N / 2 steps, and so on down to the sampler's number. On a ladder
t_1 > ... > t_N > 0 (`FewStep`), with m the teacher's time between t and the next, s:

    x_m = ddim(x_t, f(x_t, t), t, m),    x_s = ddim(x_m, f(x_m, m), m, s),
    g* = (x_s - A x_t) / B,    A = sigma_s / sigma_t,  B = alpha_s - alpha_t A,

g* being the x_0-prediction whose one step ends in x_s (appendix G). The last interval ends in the
data: there g* is the second prediction itself. The loss is w |g - g*|^2 at noised data, with the
truncated SNR w = max(1, SNR) (section 4).

A stage starts from the weights of the one before, with a new optimiser and a learning rate that
falls to zero (`Step.restart`, `Turn.rate`). The first teacher is the run's, guided by `kappa`.

With `scales` the student is told the guidance w = kappa - 1, drawn for each sample and the same in
both steps of its teacher: stage two of Meng et al. 2022 (https://arxiv.org/abs/2210.03142,
algorithm 2). Its first teacher is the run's, guided, or told w if that is what stage one
(`GuidanceDistillation`) made of it. The sampler may be theirs, too: `JumpBack` of N calls makes
steps as long as those of N / 2, from all N times, so the last stage, of N / 2 steps, learns them
from the times in the middle of its intervals as well (section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import Scale, guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import coefficients, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, JumpBack, WithInput
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler, device_of
from fewstep.distillation.flow_maps import noised, one_jump
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
from fewstep.losses.score import denoising
from fewstep.losses.weight import TruncatedSNR, Weight


@dataclass(frozen=True)
class ProgressiveDistillation(Method):
    """Progressive distillation: from `start` steps to the sampler's, halving stage by stage.

    It needs a teacher and data. ValueError for a number of steps that halving does not reach, and
    for scales that are no range about `kappa`. Salimans & Ho 2022,
    https://arxiv.org/abs/2202.00512.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5, noise="ddim", rho=2.0)
    """A `FewStep` with noise "ddim", or a `JumpBack` of an even number of calls: the finished
    student's; its stages space times alike."""
    start: int = 8
    """Steps of the first stage's student; its teacher makes twice as many."""
    stage_steps: int = 450
    """Training steps of a stage."""
    weight: Weight = TruncatedSNR()
    """w, the weight of the loss in x_0 by noise level."""
    kappa: float = 1.0
    """Guidance scale of the first teacher, part of the result; 1: none. With `scales` the one that
    the result is sampled with unless another is asked for."""
    scales: tuple[float, float] | None = None
    """The least and the largest kappa = w + 1 that the student is told; each sample's is drawn
    evenly between. None: it is told nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = self.sampler
        if isinstance(sampler, FewStep):
            fits = sampler.noise == "ddim"
        else:
            fits = isinstance(sampler, JumpBack) and sampler.steps % 2 == 0
        if not fits:
            raise ValueError(
                "ProgressiveDistillation.sampler is a FewStep(noise='ddim') or a JumpBack of an "
                f"even number of steps, got {sampler}"
            )
        halvings = math.log2(max(self.start, 1) / self.final)
        if halvings < 0 or halvings % 1 or self.stage_steps < 1:
            raise ValueError(
                f"ProgressiveDistillation.start is {self.final} steps doubled, or doubled "
                f"several times, and stage_steps 1 or more; got {self.start}, {self.stage_steps}"
            )
        if self.scales is not None and not (
            self.scales[0] < self.scales[1] and self.scales[0] <= self.kappa <= self.scales[1]
        ):
            raise ValueError(
                "ProgressiveDistillation.scales is a range, (1.0, 5.0) for example, and kappa "
                f"within it; got {self.scales} and {self.kappa:g}"
            )

    @property
    def final(self) -> int:
        """Steps of the last stage's student."""
        return self.sampler.calls // (2 if isinstance(self.sampler, JumpBack) else 1)

    @property
    def stages(self) -> int:
        """The number of stages."""
        return 1 + round(math.log2(self.start / self.final))

    def result(self, model: Model) -> Model:
        """`model`, told w if there are scales."""
        return model if self.scales is None else model_with(model, "w")

    @property
    def length(self) -> int:
        """`stage_steps` for each stage."""
        return self.stages * self.stage_steps

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the "target" that is the teacher of later stages, and the stage."""
        stage = Stage().to(device_of(net))
        start = deepcopy(net) if self.scales is None else net_with(net, "w")
        return Nets({"student": start, "target": deepcopy(start), "stage": stage})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student; the rate falls from 1 to 0 within a stage."""
        stage = min(step // self.stage_steps, self.stages - 1)
        rate = max(0.0, 1 - (step - stage * self.stage_steps) / self.stage_steps)
        return (Turn("student", partial(self.student_loss, stage), rate),)

    def after_step(self, step: Step) -> None:
        """At the end of a stage the student becomes the teacher, and starts anew."""
        stage, rest = divmod(step.step + 1, self.stage_steps)
        present: Any = step.nets["stage"]
        present.number.fill_(min(step.step // self.stage_steps, self.stages - 1))
        if not rest and stage < self.stages:
            step.nets["target"].load_state_dict(step.nets["student"].state_dict())
            step.restart("student")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The student with as many steps as the stage has that it was last trained in."""
        present: Any = nets["stage"]
        stage = int(present.number)
        sampler = self.sampler if stage == self.stages - 1 else self.stage_sampler(stage)
        told = self.scales is not None
        return Product(average, WithInput(sampler, "w", self.kappa - 1) if told else sampler)

    def stage_sampler(self, stage: int) -> FewStep:
        """The deterministic sampler of a stage's student."""
        sampler, steps = self.sampler, self.start >> stage
        if isinstance(sampler, JumpBack):
            return FewStep(sampler.t_init, steps, "ddim", sampler.rho)
        assert isinstance(sampler, FewStep)
        return replace(sampler, steps=steps)

    def student_loss(self, stage: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The loss of a stage's student against two steps of its teacher.

        Args:
            stage: its number, from 0.
            nets: the "student", and the "target", the student of the stage before.
            teacher: the teacher's denoiser, which the first stage learns from.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        x0, draws = need_data(self, batch), need_draws(batch)
        xt, t, target = self.target(stage, nets, teacher, x0, batch.cond, draws)
        student: Any = nets["student"]
        told = {} if self.scales is None else {"w": self.scale(draws).to(x0) - 1}
        prediction = student(xt, t, batch.cond, **told)
        alpha, sigma = coefficients(student.path, xt, t)
        return Loss(denoising(prediction, target, self.weight(x0, target, alpha, sigma)).mean())

    @torch.no_grad()
    def target(
        self, stage: int, nets: Nets, teacher: Denoiser, x0: Tensor, cond: Cond, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States x_t (B, *), their times t (B,), and g* (B, *)."""
        net: Any = nets["target"] if stage else teacher
        path, sampler = net.path, self.stage_sampler(stage)
        fine = constant(replace(sampler, steps=2 * sampler.steps).ladder(path), x0)
        if stage == self.stages - 1 and isinstance(self.sampler, JumpBack):
            i = draws.integers("t", len(fine))  # at the last time both of the steps are one
        else:
            i = 2 * draws.integers("t", sampler.steps)
        top = len(fine) - 1
        t, m, s = (fine[(i + k).clamp(max=top)] for k in range(3))
        last = i + 2 > top
        xt = noised(path, x0, t, draws)
        ask = self.asked(net, stage > 0, cond, draws)
        first = ask(xt, t)
        xm = path.ddim(xt, first, t, m)
        second = ask(xm, m)
        xs = path.ddim(xm, second, m, s)
        one_step = one_jump(path, xt, xs, t, s)
        return xt, t, torch.where(expand(last.to(t), xt) > 0, second, one_step)

    def scale(self, draws: Draws) -> Tensor:
        """kappa of each sample, where there are scales: (B,)."""
        assert self.scales is not None
        low, high = self.scales
        return low + (high - low) * draws.uniform("w")

    def asked(
        self, net: Any, told: bool, cond: Cond, draws: Draws
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The teacher of a stage, as a function of states and times.

        told: whether it is the student of a stage before, which knows its scale itself.
        """
        if self.scales is None:
            kappa: Scale = 1.0 if told else self.kappa
            return lambda xt, t: guided(net, xt, t, cond, [kappa]).predictions[0]
        scale = self.scale(draws)
        if told or "w" in getattr(net, "input_names", ()):
            return lambda xt, t: net(xt, t, cond, w=scale.to(xt) - 1)
        return lambda xt, t: guided(net, xt, t, cond, [scale.to(xt)]).predictions[0]
