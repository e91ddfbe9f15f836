"""A method of one's own: regress the end of the teacher's ODE from the same noise.

Knowledge distillation (Luhman & Luhman 2021, https://arxiv.org/abs/2101.02388) needs no fake score
and no data. Its students are blurred where one call cannot follow the ODE: compare them with
SiD's, which need not follow it. Run: python examples/own_method.py
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from fewstep import (
    MLP,
    Batch,
    Denoiser,
    FewStep,
    GaussianMixture,
    Heun,
    Images,
    Latents,
    Loss,
    Method,
    Model,
    Nets,
    Optim,
    Pretrain,
    Sampler,
    SiD,
    Turn,
    denoising,
    generate,
    train,
)


@dataclass(frozen=True)
class Regress(Method):
    """The student starts as the teacher's network; `solver` makes the targets."""

    sampler: Sampler = FewStep(t_init=2.5)
    solver: Sampler = Heun(steps=8)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        return Nets({"student": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        return (Turn("student", self.student_loss),)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """|G(z) - ODE(z)|^2, the mean over dimensions and batch."""
        with torch.no_grad():
            target = self.solver(teacher, batch.z, batch.cond)
        return Loss(denoising(generate(nets, self.sampler, batch), target).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    teacher = GaussianMixture.ring(count=6, std=0.2)
    net = Model(MLP(width=64, blocks=2), shape=(2,)).build()
    data = Images(teacher.sample(20_000))
    *_, fitted = train(Pretrain(), None, net, data, batch=256, steps=500, optim=Optim(2e-3))
    for method in (Regress(), SiD(alpha=1.0)):
        start, source = fitted.state.average, Latents((2,))
        *_, last = train(method, teacher, start, source, batch=256, steps=600, optim=Optim())
        with torch.no_grad():
            x = method.sampler(last.state.average, torch.randn(10_000, 2))
        fit = teacher.log_prob(x, torch.tensor(1e-3)).mean()
        print(f"{type(method).__name__}: mean log-likelihood {fit:.2f}")
    exact = teacher.log_prob(teacher.sample(10_000), torch.tensor(1e-3)).mean()
    print(f"exact samples: {exact:.2f}")
