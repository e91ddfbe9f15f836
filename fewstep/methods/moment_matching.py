"""Moment matching distillation (Salimans et al. 2024), https://arxiv.org/abs/2406.04103.

A student of K ancestral calls turns noised data z_t into a guess x = g(z_t), and x into the next
state by the posterior that noising has,

    z_s ~ q(z_s | z_t, x)    (`NoisePath.ancestral`),    s < t <= s + 1/K of the ladder.

If x were a draw of the data given z_t, then z_s would be noised data, and the mean of x given z_s
what the teacher says of it. This first conditional moment is matched at all s:

    E_g[x | z_s] = f_phi(z_s).

The left side is not known, and an auxiliary denoiser learns it, half pulled to the teacher; the
student then follows the gap of both, a vector pushed on x (algorithm 2):

    auxiliary    w_a |x - f_aux(z_s)|^2 + anchor w_a |f_phi(z_s) - f_aux(z_s)|^2,
    student      w <x, f_aux(z_s) - f_phi(z_s)>,    no gradient through z_s or any prediction.

At its optimum f_aux = (E[x | z_s] + anchor f_phi) / (1 + anchor): the direction of Diff-Instruct,
divided by 1 + anchor, at states of the sampler in place of noised outputs; with one call from pure
noise the two are the same. The updates alternate, the auxiliary network on even steps.

States start from data, so calls are trained at once and not in turn. A student without randomness
of its own (dropout, or noise as an input) meets the condition with states that are slightly wider
than the data's; the gap closes with more calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import coefficients, perturb
from fewstep.diffusion.samplers import Ancestral
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.losses.score import denoising, kl
from fewstep.losses.weight import EDMWeight, Power, Weight


class Moment(NamedTuple):
    """One step of the student: its guess x, the state z_s at s (B,), and f_phi there.

    x, zs, real: (B, *); alpha and sigma: (B, 1, ..., 1), at s. Only x has a gradient.
    """

    x: Tensor
    zs: Tensor
    s: Tensor
    real: Tensor
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class MomentMatching(Method):
    """Moment matching: one update of the auxiliary network, then one of the student.

    The defaults are eight calls, and an anchor of 1. It needs a teacher and real data. ValueError
    for another sampler than `Ancestral`, and a negative anchor. Salimans et al. 2024,
    https://arxiv.org/abs/2406.04103.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Ancestral(2.5, steps=8, rho=2.0)
    """An `Ancestral`: its ladder says how far a call leads from any time."""
    weight: Weight = Power()
    """w of the student's direction."""
    auxiliary_weight: Weight = EDMWeight()
    """w_a, the weight of the auxiliary network's loss by noise level."""
    anchor: float = 1.0
    """How much the auxiliary network is pulled to the teacher; 0: a fake score at z_s."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, Ancestral):
            raise ValueError(f"MomentMatching.sampler is an Ancestral, got {self.sampler}")
        if self.anchor < 0:
            raise ValueError(f"MomentMatching.anchor is 0 or more, got {self.anchor:g}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The "student", and the "auxiliary" network, which starts as the teacher."""
        nets = super().init(teacher, net)
        return Nets({"student": nets["student"], "auxiliary": nets["fake"]})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the auxiliary network, then one of the student."""
        return Turn("auxiliary", self.auxiliary_loss), Turn("student", self.student_loss)

    def auxiliary_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The auxiliary network against the student's guesses and the teacher's predictions.

        Args and errors as of `student_loss`. Logs nothing further.
        """
        with torch.no_grad():
            m = self.moment(nets, teacher, batch)
        auxiliary: Any = nets["auxiliary"]
        prediction = auxiliary(m.zs, m.s, batch.cond)
        weight = self.auxiliary_weight(m.x, m.real, m.alpha, m.sigma)
        own = denoising(prediction, m.x, weight)
        return Loss((own + self.anchor * denoising(prediction, m.real, weight)).mean())

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, its guesses along the gap of the moments.

        Args:
            nets: the "student" and the "auxiliary" network.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch, of which only the gradient has a meaning; logs "gap", the
        mean square of f_aux - f_phi.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        m = self.moment(nets, teacher, batch)
        auxiliary: Any = nets["auxiliary"]
        with torch.no_grad():
            mean = auxiliary(m.zs, m.s, batch.cond)
            weight = self.weight(m.x, m.real, m.alpha, m.sigma)
        gap = ((mean - m.real) ** 2).mean()
        return Loss(kl(m.x, m.real, mean, weight).mean(), {"gap": gap})

    def moment(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Moment:
        """One step of the student from noised data."""
        assert isinstance(self.sampler, Ancestral)
        x0, draws, path = need_data(self, batch), need_draws(batch), teacher.path
        share = draws.uniform("s")
        later = (share + draws.uniform("t") / self.sampler.steps).clamp(max=1)
        t, s = (self.sampler.at(path, v).to(x0) for v in (later, share))
        noise, eps = (draws.normal(name, x0.shape[1:]).to(x0) for name in ("eps", "posterior"))
        zt = perturb(path, x0, noise, t)
        student: Any = nets["student"]
        x = student(zt, t, batch.cond)
        with torch.no_grad():
            zs = path.ancestral(zt, x, eps, t, s)
            real = guided(teacher, zs, s, batch.cond, [self.kappa]).predictions[0]
        return Moment(x, zs, s, real, *coefficients(path, zs, s))
