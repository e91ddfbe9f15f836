"""Progressive adversarial distillation, SDXL-Lightning (Lin et al. 2024).

https://arxiv.org/abs/2402.13929. A student of N deterministic steps learns to land in one step
from t to s where its teacher lands in n steps; then it is the teacher of a student of fewer. With
squared errors (equation 16) such students blur, since a few steps have not the capacity of many.
So, but in the first stage, what says how near the landing is, is a discriminator

    D(x_t, x_s, t, s) = head(d(x_s, s), d(x_t, t)),                            (17, 22)

d a trainable copy of the network's encoder (here that of the stage's teacher, which it is made
from anew in every stage), against the teacher's landing as the real one (20, 21):

    L_D = E softplus(-D(x_t, x_s)) + softplus(D(x_t, x^_s)),    L_G = E softplus(-D(x_t, x^_s)).

As D hears x_t, it knows the joint law: a student with the right marginals and the wrong map, such
as a mirrored one, is told so, and modes are kept. In the last part of a stage it hears x_s alone
(equation 23, here zeros in place of d(x_t, t)): the student may leave the teacher's flow where it
cannot follow it, and its samples improve.

An encoder has little to say at t = 0. Landings on data are judged with noise, both with the same,
of one of the times 10, 250, 500, 750 of 1,000 (equations 25 and 26; published for students of one
and two steps); landings before are judged as they are. Those students learn from the stage before
the last (skip level), and at four times or more. The first input is pure noise, whatever alpha is
(24). Guidance is the first teacher's alone. Published are stages of 32 (by squared errors, from
128 steps), 8, 4, 2 and 1; adapters first and the whole network then, and a one-step student that
predicts x_0, which all networks here do.

The published rate of adversarial stages is a tenth of the regressed one's or less (1e-6 with
adapters, 5e-7 without, after 1e-5), which `rate` is for the student. There a discriminator has
learnt to judge long before a student of that rate has moved; in a few hundred updates it has
not, and a student that is led by a new head at once is lost. So in the first half of a stage,
`squared`, the student is regressed while its discriminator learns. As published: squared=0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import NoisePath, coefficients, expand, same_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler, device_of
from fewstep.distillation.call_inputs import call_input
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import NoisedSamples
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
from fewstep.distillation.stages import Stage
from fewstep.losses.score import denoising


class Jump(NamedTuple):
    """One step of the student: x_t (B, *) at t (B,), and where it should lead.

    s: (B,), the time of the landing; last: (B,), whether that is the data; xs: (B, *), the
    teacher's landing.
    """

    xt: Tensor
    t: Tensor
    s: Tensor
    last: Tensor
    xs: Tensor

    def landing(self, path: NoisePath, x0: Tensor) -> Tensor:
        """Where the prediction x_0 (B, *) at x_t leads: x_s, or the data."""
        same_shape(prediction=x0, x0=self.xs)
        return torch.where(expand(self.last, x0), x0, path.ddim(self.xt, x0, self.t, self.s))


@dataclass(frozen=True)
class Lightning(Method):
    """SDXL-Lightning: stages of fewer and fewer steps, each against a discriminator.

    It needs a teacher with encoder features (`fewstep.diffusion.encoder_features`) and data.
    ValueError for a sampler that is not deterministic, for stages that do not divide one another,
    and for a discriminator that cannot judge pairs. Lin et al. 2024,
    https://arxiv.org/abs/2402.13929.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5, noise="ddim", rho=2.0)
    """A `FewStep` with noise "ddim": the finished student's; its stages space times alike."""
    teacher_steps: int = 32
    """Steps of the run's teacher."""
    stages: tuple[int, ...] = (8, 4, 2, 1)
    """Steps of each stage's student, which divide those of the stage before."""
    stage_steps: int = 450
    """Training steps of a stage."""
    regressed: int = 1
    """The first stages, that are learned by squared errors."""
    conditional: float = 0.5
    """The part of an adversarial stage in which the discriminator hears x_t."""
    judge: Discriminator = Discriminator(Discrete((0.1, 0.7, 1.6, 4.1)), "own", joint=True)
    """What judges landings; its times, for those on data, are those published, as sigmas."""
    squared: float = 0.5
    """The part of an adversarial stage, its first, in which the student still learns by squared
    errors while the discriminator learns to judge it; 0: none, as published."""
    rate: float = 0.1
    """The student's learning rate against a discriminator, over that of squared errors."""
    skip: int = 2
    """Students of so few steps learn from the stage before the last."""
    times: int = 4
    """The least number of times that a student is trained at, if its teacher has so many steps."""
    kappa: float = 1.0
    """Guidance scale of the run's teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = self.sampler
        if not isinstance(sampler, FewStep) or sampler.noise != "ddim" or sampler.times:
            raise ValueError(
                f"Lightning.sampler is a FewStep(t_init, steps, 'ddim', rho), got {sampler}"
            )
        steps = (self.teacher_steps, *self.stages)
        falling = all(a > b > 0 and a % b == 0 for a, b in pairwise(steps))
        if not (falling and self.stages and self.stages[-1] == sampler.steps):
            raise ValueError(
                "Lightning.stages are numbers of steps, each of which divides the one before, "
                f"from teacher_steps to the sampler's {sampler.steps}; got {steps}"
            )
        if self.stage_steps < 1 or self.regressed < 0 or not 0 <= self.conditional <= 1:
            raise ValueError(
                "Lightning needs stage_steps >= 1, regressed >= 0 and conditional in [0, 1], got "
                f"{self.stage_steps}, {self.regressed} and {self.conditional:g}"
            )
        if not 0 <= self.squared < 1 or self.rate <= 0:
            raise ValueError(
                "Lightning needs squared in [0, 1) and a rate above 0, got "
                f"{self.squared:g} and {self.rate:g}"
            )
        judge = self.judge
        if not judge.joint or judge.features != "own" or judge.loss == "relativistic":
            raise ValueError(
                "Lightning.judge is Discriminator(features='own', joint=True), with a loss that "
                f"takes each sample by itself; got {judge}"
            )
        if judge.augment or judge.mismatch or judge.times is None:
            raise ValueError(
                f"Lightning.judge has times, and neither augment nor mismatch; got {judge}"
            )
        for stage in range(len(self.stages)):
            self.grid(stage)

    def noise_levels(self, path: NoisePath) -> None:
        """None: what it learns at are times of its steps."""

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples and self.regressed < len(self.stages)

    @property
    def length(self) -> int:
        """`stage_steps` for each stage."""
        return len(self.stages) * self.stage_steps

    def origin(self, stage: int) -> int:
        """The stage whose student is this stage's teacher; -1: the run's teacher."""
        return stage - (2 if stage > 0 and self.stages[stage] <= self.skip else 1)

    def grid(self, stage: int) -> tuple[int, int, int]:
        """Steps of a stage's student, the times it is trained at, and steps of its teacher."""
        origin, steps = self.origin(stage), self.stages[stage]
        fine = self.teacher_steps if origin < 0 else self.stages[origin]
        times = max(steps, min(self.times, fine))
        if fine % times or times % steps:
            raise ValueError(
                f"Lightning.times between {steps} steps of a student and {fine} of its teacher "
                f"are {times}, which should be a multiple of the one and divide the other"
            )
        return steps, times, fine

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the teachers of later stages, what judges if anything does, and the stage.

        "target" is the student of the last stage, "before" that of the one before it.
        """
        nets = Nets({"student": deepcopy(net)})
        if self.regressed < len(self.stages):
            self.judge.equipped(nets)
        behind = {i - self.origin(i) for i in range(len(self.stages)) if self.origin(i) >= 0}
        names = ("target", "before")[: max(behind, default=0)]
        nets.update({name: deepcopy(net) for name in names})
        nets["stage"] = Stage().to(device_of(net))
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, with one of the discriminator before it."""
        stage = self.stage_at(step)
        if stage < self.regressed:
            return (Turn("student", partial(self.regression_loss, stage)),)
        share = (step - stage * self.stage_steps) / self.stage_steps
        paired = share < self.squared + (1 - self.squared) * self.conditional
        judge = Turn("discriminator", partial(self.judge_loss, stage, paired))
        if share < self.squared:
            return judge, Turn("student", partial(self.regression_loss, stage))
        return judge, Turn("student", partial(self.student_loss, stage, paired), self.rate)

    def stage_at(self, step: int) -> int:
        """The stage of a step."""
        return min(step // self.stage_steps, len(self.stages) - 1)

    def after_step(self, step: Step) -> None:
        """At the end of a stage the student becomes a teacher, and all starts anew."""
        nets, stage = step.nets, self.stage_at(step.step)
        present: Any = nets["stage"]
        present.number.fill_(stage)
        if (step.step + 1) % self.stage_steps or stage + 1 == len(self.stages):
            return
        if "before" in nets:
            nets["before"].load_state_dict(nets["target"].state_dict())
        if "target" in nets:
            nets["target"].load_state_dict(nets["student"].state_dict())
        step.restart("student")
        if "discriminator" in nets:
            fresh = self.judge.equipped(Nets({"student": nets["student"]}))["discriminator"]
            nets["discriminator"].load_state_dict(fresh.state_dict())
            step.restart("discriminator")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The student with as many steps as the stage has that it was last trained in."""
        present: Any = nets["stage"]
        return Product(average, self.stage_sampler(self.stages[int(present.number)]))

    def stage_sampler(self, steps: int) -> FewStep:
        """The sampler with so many steps."""
        assert isinstance(self.sampler, FewStep)
        return replace(self.sampler, steps=steps)

    @torch.no_grad()
    def jump(self, stage: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Jump:
        """A step of a stage's student from noised data, and where its teacher lands."""
        x0, (steps, times, fine) = need_data(self, batch), self.grid(stage)
        origin = self.origin(stage)
        names = {stage - 1: "target", stage - 2: "before"}
        net: Any = teacher if origin < 0 else nets[names[origin]]
        kappa, path = (self.kappa if origin < 0 else 1.0), net.path
        sampler, stride = self.stage_sampler(fine), fine // steps
        ladder = constant([*sampler.ladder(path), path.t_min], x0)
        start = need_draws(batch).integers("t", times) * (fine // times)
        end = (start // stride + 1) * stride
        t, s, last = ladder[start], ladder[end], end == fine
        xt = x = call_input(sampler, path, x0, batch.z, t)
        for step in range(stride):
            here = (start + step).clamp(max=fine - 1)
            now, then = ladder[here], ladder[here + 1]
            x0 = guided(net, x, now, batch.cond, [kappa]).predictions[0]
            onward = torch.where(expand(here + 1 == fine, x), x0, path.ddim(x, x0, now, then))
            x = torch.where(expand(start + step < end, x), onward, x)
        return Jump(xt, t, s, last, x)

    def predicted(self, nets: Nets, jump: Jump, cond: Cond) -> Tensor:
        """The student's landing: (B, *)."""
        student: Any = nets["student"]
        return jump.landing(student.path, student(jump.xt, jump.t, cond))

    def regression_loss(self, stage: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """|x^_s - x_s|^2, the mean over dimensions and batch; arguments as of `student_loss`."""
        jump = self.jump(stage, nets, teacher, batch)
        return Loss(denoising(self.predicted(nets, jump, batch.cond), jump.xs).mean())

    def seen(self, path: NoisePath, x: Tensor, jump: Jump, batch: Batch) -> NoisedSamples:
        """Landings (B, *) as the discriminator sees them: those on data with noise."""
        n, last = self.judge.noised(path, x, batch), expand(jump.last, x)
        t = torch.where(jump.last, n.t, jump.s)
        return NoisedSamples(torch.where(last, n.xt, x), t, *coefficients(path, x, t))

    def judge_loss(
        self, stage: int, paired: bool, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The discriminator's loss; arguments as of `student_loss`, logs as of the judge."""
        jump = self.jump(stage, nets, teacher, batch)
        with torch.no_grad():
            x = self.predicted(nets, jump, batch.cond)
        fake, real = (self.seen(teacher.path, one, jump, batch) for one in (x, jump.xs))
        pair = self.judge.compared(x, fake, real, (jump.xt, jump.t) if paired else None)
        return self.judge.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(
        self, stage: int, paired: bool, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The student's adversarial loss.

        Args:
            stage: its number, from 0.
            paired: whether the discriminator hears x_t.
            nets: the "student", the "discriminator", and the teachers of later stages.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), z, cond and draws.

        Returns: the mean over the batch; logs "gan_loss", the same.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        jump = self.jump(stage, nets, teacher, batch)
        x = self.predicted(nets, jump, batch.cond)
        n = self.seen(teacher.path, x, jump, batch)
        beside = (jump.xt, jump.t) if paired else None
        gan = self.judge.fool(nets, teacher, batch, n, batch.cond, beside=beside)
        return Loss(gan.total, {"gan_loss": gan.gan_loss})
