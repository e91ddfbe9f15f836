"""Distillation of guidance (Meng et al. 2022), stage one, https://arxiv.org/abs/2210.03142.

A guided teacher is two calls. The student learns their mixture for a whole range of scales, and is
told which: with w = kappa - 1,

    f_w = (1 + w) f(x_t, c) - w f(x_t, none),
    L = E_w E omega(t) |g(x_t, t, c, w) - f_w(x_t)|^2,    omega = max(1, SNR)

(equations 2 and 3), at noised data. Mixing is affine, so predictions of x_0 serve teachers of any
parameterisation. The student starts as the teacher, and does not hear w at first: w is a further
input (`fewstep.diffusion.extra_inputs`), embedded beside the time.

What is made is no few-step student but a teacher of half the calls: it is sampled as teachers are,
at one scale of choice (`WithInput`), and few-step students can be distilled from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import Heun, WithInput
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import NoisedSamples, add_noise
from fewstep.distillation.method import Loss, Method, Nets, Product, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.score import denoising
from fewstep.losses.weight import TruncatedSNR, Weight


@dataclass(frozen=True)
class GuidanceDistillation(Method):
    """One network in place of a guided teacher's two calls, for all scales of a range.

    It needs data and a teacher that knows conditions. ValueError where the scales are no range, or
    `kappa` is outside. Meng et al. 2022, https://arxiv.org/abs/2210.03142.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Heun()
    """How the result is sampled, at the scale `kappa`: as a teacher is."""
    kappa: float = 1.5
    """The scale that the result is sampled with unless another is asked for."""
    scales: tuple[float, float] = (1.0, 5.0)
    """The least and the largest kappa = w + 1; each sample's is drawn evenly between."""
    times: TimeLaw = LogNormal()
    """Noise levels of the data."""
    weight: Weight = TruncatedSNR()
    """omega, the weight of the loss by noise level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scales
        if not low < high or not low <= self.kappa <= high:
            raise ValueError(
                "GuidanceDistillation.scales is a range, (1.0, 5.0) for example, and kappa within "
                f"it; got {self.scales} and {self.kappa:g}"
            )

    def result(self, model: Model) -> Model:
        """`model` that is told w."""
        return model_with(model, "w")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` that is told w, which it does not hear at first."""
        return Nets({"student": net_with(net, "w")})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The average at the scale `kappa`."""
        return Product(average, WithInput(self.sampler, "w", self.kappa - 1))

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The regression on the guided teacher.

        Args:
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no data, draws or conditions.
        """
        student: Any = nets["student"]
        x0 = need_data(self, batch)
        n = add_noise(student.path, x0, self.times, batch)
        w = self.scale(batch).to(x0) - 1
        target = self.target(teacher, n, batch, w)
        weight = self.weight(x0, target, n.alpha, n.sigma)
        return Loss(denoising(student(n.xt, n.t, batch.cond, w=w), target, weight).mean())

    def scale(self, batch: Batch) -> Tensor:
        """kappa of each sample: (B,)."""
        low, high = self.scales
        return low + (high - low) * need_draws(batch).uniform("w")

    @torch.no_grad()
    def target(self, teacher: Denoiser, n: NoisedSamples, batch: Batch, w: Tensor) -> Tensor:
        """f_w at noised samples: (B, *)."""
        return guided(teacher, n.xt, n.t, batch.cond, [1 + w]).predictions[0]
