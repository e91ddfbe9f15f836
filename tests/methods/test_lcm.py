"""LCM: at every scale the fixed point is the product of the guided teacher's steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, WithInput
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder
from fewstep.distillation.method import Nets
from fewstep.methods.lcm import LCM
from fewstep.nets.mlp import MLP
from tests.quadrature import F64

WITH, FREE = 0.25, 0.6
"""The data's variance with a condition, and without."""


class Guidable(nn.Module):
    """The denoisers of two Gaussians, with a condition and without."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path = path

    def gain(self, t: Tensor, lam: float) -> Tensor:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return alpha * lam / (alpha**2 * lam + sigma**2)

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.gain(t, FREE if cond is None else WITH)[:, None] * xt


class Products(nn.Module):
    """The consistency function that is the product of guided DDIM steps, for any w it is told."""

    def __init__(self, teacher: Guidable, times: list[float], scale: float = 1.0) -> None:
        super().__init__()
        self.teacher, self.path, self.scale = teacher, teacher.path, scale
        self.times = torch.tensor(times, dtype=F64)
        self.size = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, w: Tensor) -> Tensor:
        kappa, path, times = 1 + self.scale * w.double(), self.path, self.times
        at = (times - t[:, None]).abs().argmin(1)
        gain = torch.ones_like(kappa)
        for n in range(1, len(times)):
            v, u = times[n], times[n - 1]
            free, told = self.teacher.gain(v, FREE), self.teacher.gain(v, WITH)
            f = free + kappa * (told - free)
            a = path.sigma(u) / path.sigma(v)
            step = a + (path.alpha(u) - a * path.alpha(v)) * f
            gain = torch.where(at >= n, gain * step, gain)
        s, here = times[0], torch.where(at > 0, t, times[1])
        a = path.sigma(s) / path.sigma(here)
        return self.size * ((gain - a) / (path.alpha(s) - a * path.alpha(here)))[:, None] * xt


def scene(path: NoisePath) -> tuple[Guidable, Batch]:
    draws = Draws.range(0, 200)
    x0 = 0.5 * draws.normal("x0", (1,), F64)
    return Guidable(path), Batch(x0, draws.integers("label", 3), x0, draws)


@pytest.mark.parametrize(
    "case", [(VE(), 2.5), (Flow(), 1.0), (VP(), 999.0)], ids=lambda case: repr(case[0])[:4]
)
def test_the_product_of_guided_steps_is_the_fixed_point(case: tuple[NoisePath, float]) -> None:
    """For all scales at once; not that of kappa read as w, nor of one scale for all."""
    path, start = case
    m = LCM(WithInput(FewStep(start), "w", 0.0), Ladder(12), decay=0.0)
    teacher, batch = scene(path)
    kappa, w = m.scales(batch)
    assert isinstance(kappa, Tensor)
    assert 1 <= kappa.min() < 2 < 14 < kappa.max() <= 15
    torch.testing.assert_close(kappa, w + 1)
    times = m.ladder.times(path, start)

    def loss(net: nn.Module, m: LCM = m) -> Tensor:
        total = m.student_loss(Nets({"student": net}), teacher, batch).total
        assert total is not None
        return total

    net = Products(teacher, times)
    (gradient,) = torch.autograd.grad(loss(net), net.size)
    assert loss(net).item() < 1e-9
    assert abs(gradient.item()) < 1e-6
    assert loss(Products(teacher, times, 1.1)).item() > 1e-6
    assert loss(net, replace(m, kappa=(4.0, 4.0))).item() < 1e-9
    shifted = replace(m, kappa=(4.0, 4.0))
    object.__setattr__(shifted, "scales", lambda batch: (4.0, torch.full((200,), 4.0)))
    assert loss(net, shifted).item() > 1e-6  # w is kappa - 1


def test_hubers_loss_by_hand() -> None:
    m = LCM(WithInput(FewStep(2.5), "w", 0.0), Ladder(4), c=0.01, decay=0.0)
    teacher, batch = scene(VE())
    net = Products(teacher, m.ladder.times(VE(), 2.5))
    net.size.data.fill_(0.7)
    found = m.student_loss(Nets({"student": net}), teacher, batch)
    error = found.logs["error"]
    assert found.total is not None
    assert 0 < found.total.item() < error.sqrt().item()  # a modulus where errors are large
    near = replace(m, c=100.0).student_loss(Nets({"student": net}), teacher, batch).total
    assert near is not None
    assert near.item() == pytest.approx(error.item() / 200, rel=1e-3)  # y^2 / 2 c


def test_the_student_is_told_w_and_starts_as_the_teacher() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    m = LCM()
    nets = m.init(net, net)
    assert set(nets) == {"student", "target"}
    draws = Draws.range(0, 4)
    x, t, cond = draws.normal("x", (2,)), draws.uniform("t"), draws.integers("label", 3)
    student: Any = nets["student"]
    assert torch.equal(student(x, t, cond, w=t), net(x, t, cond))
    assert m.result(model) == replace(model, inputs=("w",))
    assert m.result(m.result(model)) == m.result(model)


def test_published_times_of_stable_diffusion() -> None:
    """Twenty timesteps are skipped; with 48 steps the sampler's four times are trained ones."""
    assert LCM(ladder=Ladder(50)).ladder.times(VP(), 999.0)[:4] == [0.0, 19.0, 39.0, 59.0]
    assert set(FewStep(999.0, 4).ladder(VP())) <= set(LCM().ladder.times(VP(), 999.0))
    assert not set(FewStep(999.0, 4).ladder(VP())) <= set(Ladder(50).times(VP(), 999.0))


@pytest.mark.parametrize(
    "settings", [{"kappa": (3.0, 2.0)}, {"c": 0.0}, {"order": 3}, {"decay": -0.1}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    refusal = r"LCM(\.decay is at least|\.order is 1 or 2| needs kappa)"
    with pytest.raises(ValueError, match=refusal):
        LCM(**settings)
