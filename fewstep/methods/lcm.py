"""Latent consistency models (Luo et al. 2023), https://arxiv.org/abs/2310.04378.

Consistency distillation of a guided teacher, whose scale is an input of the student. With
x_u one DDIM step, from t to the next time u of the ladder, of

    f_kappa = f(x_t, none) + kappa (f(x_t, c) - f(x_t, none)),    kappa = 1 + w

(the augmented probability flow, section 4.2), the student's end of the trajectory is the same from
both of its points, at the same w,

    L = E d(X(x_t, t, s; w), X^-(x_u, u, s; w)),    d(y) = mean_i (y_i^2 + c^2)^(1/2) - c,

s being the path's end, X^- an average of the student, and kappa drawn for each sample. A step of
the ladder skips many timesteps (section 4.3): 20 of a thousand as published. The published number
of steps is 50; 48 can be divided into 2, 3, 4, 6 or 8, so that on timesteps those that a sampler
calls are among those that are trained. The student is sampled by denoising and renoising, told w
(`WithInput`). In place of the paper's coefficients, which on timesteps are 1 and 0 to 3e-6 but at
the first, the jump X holds the boundary condition (`fewstep.distillation.flow_maps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fewstep.diffusion.guidance import Scale
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, WithInput
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Ladder,
    Pair,
    both_ends,
    follow,
    huber_loss,
    pair_on,
    require_decay,
    start_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.named_inputs import model_with, net_with


@dataclass(frozen=True)
class LCM(Method):
    """Latent consistency distillation: one update of a student that is told the guidance scale.

    It needs a teacher, with conditions unless `kappa` is (1, 1), and data. ValueError for values
    out of range. Luo et al. 2023, https://arxiv.org/abs/2310.04378.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = WithInput(FewStep(2.5, 4), "w", 0.0)
    """How the finished net generates; its input w is the guidance scale of the samples less 1."""
    ladder: Ladder = Ladder(48)
    """The times of the teacher's steps, up to the sampler's first."""
    kappa: tuple[float, float] = (1.0, 15.0)
    """The least and largest guidance scale (published: 3 to 15, for text to image)."""
    c: float = 0.001
    """Size of an element's error at which the loss turns from a square to a modulus."""
    decay: float = 0.95
    """Share of itself that the target's average keeps in a step; 0: it is the student."""
    order: Literal[1, 2] = 1
    """Order of the teacher's solver: 1 is DDIM, 2 Heun's method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if not self.kappa[0] <= self.kappa[1] or self.c <= 0:
            raise ValueError(
                "LCM needs kappa to be two scales in order and c > 0, got "
                f"{self.kappa} and {self.c:g}"
            )

    def result(self, model: Model) -> Model:
        """`model` that is told w."""
        return model_with(model, "w")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that is told w but does not hear it yet; its target."""
        return with_target(net_with(net, "w"), self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The difference of the student's ends of one guided trajectory.

        Args:
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "error", the mean square of the difference.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        at, (kappa, w) = self.pair(teacher.path, batch), self.scales(batch)
        prediction, target = both_ends(nets, teacher, at, kappa, self.order, {"w": w})
        return huber_loss(prediction, target, self.c)

    def pair(self, path: NoisePath, batch: Batch) -> Pair:
        """Noised data at a time of the ladder, the time below it, and the ladder's end."""
        times = self.ladder.times(path, start_of(self.sampler, path))
        return pair_on(self, times, path, batch)

    def scales(self, batch: Batch) -> tuple[Scale, Tensor]:
        """kappa of each sample, one number where all are equal, and w = kappa - 1, (B,)."""
        low, high = self.kappa
        kappa = low + (high - low) * need_draws(batch).uniform("kappa")
        return (low if low == high else kappa), kappa - 1
