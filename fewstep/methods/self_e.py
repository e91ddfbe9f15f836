"""Self-E (Yu et al. 2025), https://arxiv.org/abs/2512.22374: a student that is its own critic.

One network G(x_t, t, s, c) learns from data, as a denoiser does, and from what it thinks of its
own samples, with no fake score or discriminator beside it. At s = t it is a denoiser; for s < t
its output x should be such that x with noise of level s has the law of noised data. The guided
reverse KL divergence has two directions there (equation 13), and G itself says both, at x_s with
no gradient:

    classifier    f_0 - f_c        = -(sigma^2 / alpha) grad log q(c | x_s),
    auxiliary     f_fake - f_c     =  (sigma^2 / alpha) (grad log p - grad log q)(x_s | c),

f_c = G(x_s, s, s, c), by an average of the network, f_0 = G(x_s, s, s, none), and f_fake the same
network told by a further input that it looks at samples of its own, which it learns to denoise. At
guidance scale w, in units of the whole,

    Delta = (1 - 1/w) (f_0 - f_c) + (1/w) (f_fake - f_c),    x_self = x - Delta,

and each output is regressed on datum and x_self (equations 16 to 20)

    L = E w_t |x - target|^2,    target ~ x_0 + lambda x_self,  |target| = |x_0|,
    lambda = sigma_t / alpha_t - sigma_s / alpha_s.

At s = t this is the denoising loss. Data keep the samples diverse, and the more so the closer s is
to t; a jump to s is a compromise of a blurred guess and a sample, nearer to the sample the larger
the jump. The classifier term alone comes first, as the fake branch is worth nothing until it has
learned; it needs conditions, and w = 1 does without it.

The paper trains from scratch. Here the student starts as the teacher, with two more inputs that it
does not hear at first, so the jumps may be long from the start. Unpublished are the share of
conditions that are dropped, and the weight of the fake branch's loss, 1 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, coefficients, expand, same_shape
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.time_distributions import LogitNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    OfFlowTime,
    follow,
    level,
    noised,
    require_decay,
    target_of,
    with_target,
)
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_data, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Weight


class Jump(NamedTuple):
    """Noised data x_t (B, *), its time t, the time s <= t that is jumped to, and its scale.

    scale: (B,), 0 for samples whose condition is dropped, 1 for the others.
    """

    xt: Tensor
    t: Tensor
    s: Tensor
    scale: Tensor


class Opinion(NamedTuple):
    """What the network thinks of its samples: Delta, its two parts, and the fake branch's loss.

    classifier, auxiliary: (B, *), with their factors; fake: (), with a gradient.
    """

    classifier: Tensor
    auxiliary: Tensor
    fake: Tensor

    @property
    def delta(self) -> Tensor:
        """(B, *)."""
        return self.classifier + self.auxiliary


@dataclass(frozen=True)
class SelfE(Method):
    """Self-E: one update of a student that jumps between any two times and judges where it lands.

    It needs data, no teacher, and conditions unless kappa is 1. ValueError for values out of
    range. Yu et al. 2025, https://arxiv.org/abs/2512.22374.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Jumps(2.5, steps=8, rho=2.0)
    kappa: float = 1.0
    """Guidance scale w that is built in (published: 10, a share 1 - 1/w = 0.9 of the classifier
    term); 1: none, the auxiliary term alone."""
    times: TimeLaw = LogitNormal()
    """The law of t, as a flow time tau in (0, 1)."""
    diagonal: float = 0.5
    """Share of samples with s = t, which learn from data alone."""
    anneal: int = 0
    """Steps over which s comes to be uniform in flow time below t (published, from scratch:
    300,000)."""
    auxiliary_from: int = 0
    """First step with the auxiliary term (published, from scratch: 550,000 of 710,000)."""
    decay: float = 0.9999
    """Share of itself that the average, which says f_c, keeps in a step; 0: it is the student."""
    weight: Weight = EDMWeight()
    """w_t, the weight of the loss by noise level (published: 1 / t^2 on a flow,
    `Power(0, -2)`)."""
    renormalise: bool = True
    """Whether targets have the norm of their data."""
    drop: float = 0.1
    """Share of conditions that are dropped, so that f_0 is learned; none at kappa = 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if self.kappa < 1 or min(self.anneal, self.auxiliary_from) < 0:
            raise ValueError(
                "SelfE needs kappa >= 1, and anneal and auxiliary_from of 0 or more, got "
                f"{self.kappa:g}, {self.anneal} and {self.auxiliary_from}"
            )
        if not 0 <= self.diagonal < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                "SelfE.diagonal and SelfE.drop are shares below 1, got "
                f"{self.diagonal:g} and {self.drop:g}"
            )

    def result(self, model: Model) -> Model:
        """`model` with a second time, and the input that tells it of its own samples."""
        return model_with(model_with(model, "s"), "fake")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with two more inputs; and the average that says f_c."""
        return with_target(net_with(net_with(net, "s"), "fake"), self.decay)

    def noise_levels(self, path: NoisePath) -> TimeLaw:
        """The times at which the flow time is distributed as `times` says."""
        return OfFlowTime(self.times, path)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        reach = min(1.0, step / self.anneal) if self.anneal else 1.0
        late = step >= self.auxiliary_from
        return (Turn("student", partial(self.student_loss, reach, late)),)

    def after_step(self, step: Step) -> None:
        """The average follows the student."""
        follow(step, self.decay)

    def student_loss(
        self, reach: float, late: bool, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The regression on data and on the network's own opinion, and that of the fake branch.

        Args:
            reach: the longest jump, as a share of t in flow time.
            late: whether the auxiliary term is on.
            nets: the "student", and the "target" that follows it.
            teacher: not used.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "classifier" and "auxiliary", the mean absolute
        parts of Delta, and "fake", the fake branch's loss.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        student: Any = nets["student"]
        path, x0 = student.path, need_data(self, batch)
        at = self.jump(path, reach, batch)
        scale = at.scale if self.kappa > 1 and self.drop else 1.0
        named = {"s": at.s}
        (x,), _ = guided(student, at.xt, at.t, batch.cond, [scale], named=named)
        same_shape(x0=x0, prediction=x)
        opinion = self.opinion(nets, x.detach(), at, late, batch)
        target = self.target(path, x0, x.detach() - opinion.delta, at)
        weight = self.weight(x0, x0, *coefficients(path, x0, at.t))
        regression = denoising(x, target, weight).mean()
        logs = {
            "classifier": opinion.classifier.abs().mean(),
            "auxiliary": opinion.auxiliary.abs().mean(),
            "fake": opinion.fake.detach(),
        }
        return Loss(regression + opinion.fake, logs)

    @torch.no_grad()
    def jump(self, path: NoisePath, reach: float, batch: Batch) -> Jump:
        """Noised data at a random time, and the time that is jumped to."""
        x0, draws = need_data(self, batch), need_draws(batch)
        tau = self.times.quantile(draws.uniform("t")).to(x0)
        rho = tau * (1 - reach * draws.uniform("s").to(x0))
        t, s = path.time_of(tau), path.time_of(rho)
        s = torch.where(draws.uniform("diagonal") < self.diagonal, t, s)
        kept = (draws.uniform("drop") >= self.drop).to(x0)
        return Jump(noised(path, x0, t, draws), t, s, kept)

    def opinion(self, nets: Nets, x: Tensor, at: Jump, late: bool, batch: Batch) -> Opinion:
        """What the network thinks of its outputs x (B, *), with noise of the level s."""
        student: Any = nets["student"]
        path, s, cond = student.path, at.s, batch.cond
        xs = noised(path, x, s, need_draws(batch).under("self"))
        zero, share = torch.zeros_like(x), 1 - 1 / self.kappa
        classifier = auxiliary = zero
        with target_of(nets) as judge:
            told = judge(xs, s, cond, s=s)
            same_shape(x0=x, prediction=told)
            if self.kappa > 1:
                free = guided(student, xs, s, cond, [0.0], named={"s": s}).predictions[0]
                classifier = (share if late else 1.0) * (free - told)
        if not late:
            return Opinion(classifier, auxiliary, zero.sum())
        fake = student(xs, s, cond, s=s, fake=torch.ones_like(s))
        auxiliary = (fake.detach() - told) / self.kappa
        jumped = expand((at.s < at.t).to(x), x)
        weight = jumped * self.weight(x, x, *coefficients(path, x, s))
        return Opinion(classifier, auxiliary, denoising(fake, x, weight).mean())

    @torch.no_grad()
    def target(self, path: NoisePath, x0: Tensor, x_self: Tensor, at: Jump) -> Tensor:
        """(x_0 + lambda x_self) / (1 + lambda), renormalised: (B, *).

        It is x_0 for samples whose condition is dropped.
        """
        gap = level(path, at.t) - level(path, at.s)
        share = expand(at.scale * (1 - 1 / (1 + gap)), x0)
        target = torch.lerp(x0, x_self, share)
        if not self.renormalise:
            return target
        size = target.flatten(1).norm(dim=1).clamp(min=1e-12)
        return target * expand(x0.flatten(1).norm(dim=1) / size, x0)
