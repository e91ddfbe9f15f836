"""Multi-student distillation (Song et al. 2024), https://arxiv.org/abs/2410.23274.

What one student of one call cannot hold, several can. The conditions are divided among K students
G_1, ..., G_K, and at inference each sample goes to the student that knows its condition, so that
it costs one call of one of them: K times the weights at the same speed, or small students in place
of a large one. Here conditions are labels, and label c is that of student c mod K
(`fewstep.nets.routed`; the paper divides consecutive labels, and found clusters no better).

1. Teacher score matching, for students that are not of the teacher's architecture and so start
   from new weights: they learn to denoise as the teacher does, on real data,

       E w |G_k(x_t, t) - f_phi(x_t, t)|^2    for the labels of k,

   where a student's network is called as a denoiser, at all noise levels.
2. Distribution matching, each student on its own labels: DMD's direction on its samples,

       (f_psi - f_phi) / mean |x - f_phi|,    no backward pass through either network.

As the teacher and the fake score know the label, and no sample reaches another student than its
own, the loss falls into K losses of K students. The published students have fake scores of their
own; here one that knows the label serves all. The published third stage, with an adversarial loss,
is `DMD2` with `--init` the result and `--model.net "Routed(...)"`.

The students' size is the run's: `--model.net "MLP(width=32, blocks=1)"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from fewstep.diffusion.denoisers import EDM, Eps, V, Velocity
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, add_noise, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data
from fewstep.distillation.pace import Updates
from fewstep.losses.score import denoising
from fewstep.losses.weight import L1, Weight
from fewstep.nets.lora import Adapted
from fewstep.nets.routed import Routed, RoutedNet


@dataclass(frozen=True)
class MSD(Method):
    """Multi-student distillation: score matching, then `ratio` updates of the fake score and one.

    It needs a teacher and data with labels. A batch is divided among the students by its labels.
    ValueError for numbers out of range, and for a network with adapters. Song et al. 2024,
    https://arxiv.org/abs/2410.23274.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5)
    students: int = 2
    """K, each with a K-th of the labels (published: 4)."""
    score_steps: int = 600
    """Training steps of teacher score matching; few do for students of the teacher's network."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the students' distribution matching: 20 to 980 of a thousand."""
    weight: Weight = L1()
    """w of the students' direction; L1 is 1 / mean |x - f_phi|."""
    fake: FakeScore = FakeScore()
    """The fake score; its noise levels and weight are those of score matching, too."""
    ratio: Updates = 1
    """Updates of the fake score for one of the students (published with its GAN: 5)."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of few-step students' outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.students < 1 or self.score_steps < 0:
            raise ValueError(
                "MSD needs students >= 1 and score_steps >= 0, got "
                f"{self.students} and {self.score_steps}"
            )

    def result(self, model: Model) -> Model:
        """As many networks like the model's as there are students."""
        return replace(model, net=Routed(model.net, self.students))

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The students, as one "student" that all start as `net`, and the fake score."""
        if any(isinstance(module, Adapted) for module in net.modules()):
            raise ValueError("MSD trains whole networks, as many as students: leave out --lora")
        nets = super().init(teacher, net)
        student: Any = nets["student"]
        if isinstance(student, EDM | Eps | V | Velocity):
            student.net = RoutedNet(deepcopy(student.net) for _ in range(self.students))
        else:
            nets["student"] = RoutedNet(deepcopy(student) for _ in range(self.students))
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the students; after score matching, `ratio` of the fake score first."""
        if step < self.score_steps:
            return (Turn("student", self.score_loss),)
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def after_step(self, step: Step) -> None:
        """The students start anew when their scores are matched."""
        super().after_step(step)
        if step.step + 1 == self.score_steps:
            step.restart("student")

    def score_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The students against the teacher at noised data (teacher score matching).

        batch: x0 (B, *), labels and draws. Returns the mean over the batch. ValueError where the
        batch has no data, labels or draws.
        """
        x0 = need_data(self, batch)
        student: Any = nets["student"]
        n = add_noise(teacher.path, x0, self.fake.times, batch)
        with torch.no_grad():
            target = teacher(n.xt, n.t, batch.cond)
        weight = self.fake.weight(x0, target, n.alpha, n.sigma)
        return Loss(denoising(student(n.xt, n.t, batch.cond), target, weight).mean())

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The students' loss, the KL direction; teacher and fake score run without a graph.

        Args:
            rollout: makes the samples x, (B, *), each by its student.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), labels and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning.

        Raises ValueError where the batch has no labels or draws.
        """
        x = rollout(nets, batch)
        return Loss(kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance))
