"""Distribution backtracking (Zhang et al. 2024), https://arxiv.org/abs/2408.15991.

A student at its start and its teacher have little in common, and a teacher's scores far from what
it knows say little. Between both lies a path of laws, which is found from the student's end:

1. Degradation recording. A copy of the teacher learns to denoise the samples of the untouched
   student G_0,

       min_psi E w |f_psi(x_t) - x|^2,    x = G_0(z),

   and turns from the teacher phi into the score of the student's own law. On the way copies
   psi_1, ..., psi_(M - 1) are kept, and psi_M at the end.
2. Distribution backtracking. The student follows the path back: its targets are psi_(M - 1), ...,
   psi_1 and at last phi, each for a number of steps, by the gradient of KL(student || target),

       w (f_psi - f_target),    no backward pass through either network.

   The fake score f_psi goes on from psi_M, which is where it is needed, and follows the student.

So no target is far from the student. The last stage is DMD2 without its GAN
(https://arxiv.org/abs/2405.14867); any other score distillation would do there.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, predict
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn
from fewstep.distillation.pace import Updates
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class DisBack(Method):
    """Distribution backtracking: record the teacher's decay to the student, then walk back.

    Recording takes (targets + 1) record_steps training steps, in which the student rests; then
    come targets times target_steps, and the teacher itself until the run ends. The path is short,
    to suit small students; on SDXL the released script has targets 9, record_steps 100,
    target_steps 1000, ratio 5. Every target is a network in memory. It needs a teacher and no
    data. ValueError for numbers below 1. Zhang et al. 2024, https://arxiv.org/abs/2408.15991.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's loss: 20 to 980 of a thousand."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_target|."""
    fake: FakeScore = FakeScore()
    """How the fake score learns while it decays from the teacher, and while it follows the
    student."""
    targets: int = 3
    """M - 1, the laws between teacher and student that are kept."""
    record_steps: int = 20
    """Training steps from one recorded law to the next."""
    target_steps: int = 100
    """Training steps for which the student follows each recorded law."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student, once it moves."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.targets, self.record_steps, self.target_steps) < 1:
            raise ValueError(
                "DisBack needs targets, record_steps and target_steps of 1 or more, got "
                f"{self.targets}, {self.record_steps} and {self.target_steps}"
            )

    @property
    def recording(self) -> int:
        """The training steps before the student moves."""
        return (self.targets + 1) * self.record_steps

    def target(self, step: int) -> str:
        """The net that the student follows at a step, or "teacher"."""
        left = self.targets - max(0, step - self.recording) // self.target_steps
        return f"target{left}" if left > 0 else "teacher"

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, the fake score, and "target1" ..., which are filled in while recording."""
        nets = super().init(teacher, net)
        for number in range(self.targets):
            nets[f"target{number + 1}"] = deepcopy(nets["fake"])
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the fake score while recording; then `ratio` and one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        if step < self.recording:
            return (fake,)
        loss = partial(self.student_loss, rollout, self.target(step))
        return *self.fake_updates(fake), Turn("student", loss)

    def after_step(self, step: Step) -> None:
        """Keep the decayed teacher; when all is recorded, both nets start anew."""
        super().after_step(step)
        number, rest = divmod(step.step + 1, self.record_steps)
        if not rest and number <= self.targets:
            step.nets[f"target{number}"].load_state_dict(step.nets["fake"].state_dict())
        if step.step + 1 == self.recording:
            step.restart("fake")
            step.restart("student")

    def student_loss(
        self, rollout: Rollout, target: str, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The student's loss, the KL direction to a target; it and the fake score have no graph.

        Args:
            rollout: makes the student's samples x, (B, *).
            target: the net that takes the teacher's place, or "teacher" for itself.
            nets: the "student", the "fake" score and the targets.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning; logs "gap", the
        mean square of f_psi - f_target.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        x = rollout(nets, batch)
        real: Any = teacher if target == "teacher" else nets[target]
        with torch.no_grad():
            p = predict(nets, real, batch, x, self.times, self.guidance)
            weight = self.weight(x, p.real, p.alpha, p.sigma)
        loss = kl(x, p.real, p.fake, weight).mean()
        return Loss(loss, {"gap": ((p.fake - p.real) ** 2).mean()})
