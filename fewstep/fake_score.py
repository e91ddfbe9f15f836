"""What the score-distillation methods share: samples, noising, and the fake score.

The fake score f_psi follows the student's own distribution: it learns to denoise generated
samples, and at its optimum is E[x | x_t] under the student. Methods differ only in what they do
with f_psi and the teacher f_phi at a noised sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core import Batch, Denoiser, Loss, Nets, Sampler, Turn, need_draws
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Weight
from fewstep.path import NoisePath, coefficients, perturb
from fewstep.times import LogNormal, TimeLaw


class Noised(NamedTuple):
    """Samples at random noise levels: xt (B, *), t (B,), alpha and sigma (B, 1, ..., 1)."""

    xt: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Predictions(NamedTuple):
    """Both denoisers at a noised sample: real = f_phi(x_t), fake = f_psi(x_t), each (B, *)."""

    real: Tensor
    fake: Tensor
    alpha: Tensor
    sigma: Tensor


def noised(path: NoisePath, x: Tensor, times: TimeLaw, batch: Batch) -> Noised:
    """x: (B, *) moved to times drawn from `times` with fresh noise."""
    draws = need_draws(batch)
    t = times.quantile(draws.uniform("t")).to(x)
    eps = draws.normal("eps", x.shape[1:]).to(x)
    alpha, sigma = coefficients(path, x, t)
    return Noised(perturb(path, x, eps, t), t, alpha, sigma)


def generate(nets: Nets, sampler: Sampler, batch: Batch) -> Tensor:
    """The student's samples for this batch: (B, *)."""
    student: Any = nets["student"]
    return sampler(student, batch.z, batch.cond, batch.draws)


def predict(nets: Nets, teacher: Denoiser, batch: Batch, x: Tensor, times: TimeLaw) -> Predictions:
    """Teacher and fake score at x moved to times drawn from `times`."""
    n = noised(teacher.path, x, times, batch)
    real = teacher(n.xt, n.t, batch.cond)
    fake = nets["fake"](n.xt, n.t, batch.cond)
    return Predictions(real, fake, n.alpha, n.sigma)


@dataclass(frozen=True)
class FakeScore:
    """How nets["fake"] learns: the law of its noise levels and the weight of its loss."""

    times: TimeLaw = LogNormal()
    weight: Weight = EDMWeight()

    def turn(self, sampler: Sampler) -> Turn:
        """The update of the fake score on samples made with `sampler`."""
        return Turn("fake", lambda nets, teacher, batch: self.loss(sampler, nets, teacher, batch))

    def loss(self, sampler: Sampler, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """Denoising of the student's samples, which carry no gradient."""
        with torch.no_grad():
            x = generate(nets, sampler, batch)
        n = noised(teacher.path, x, self.times, batch)
        prediction = nets["fake"](n.xt, n.t, batch.cond)
        return Loss(denoising(prediction, x, self.weight(x, x, n.alpha, n.sigma)).mean())
