"""Consistency distillation on a Gaussian: its fixed point is the product of the solver's steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder, jump
from fewstep.distillation.method import Nets
from fewstep.losses.distance import PseudoHuber
from fewstep.methods.consistency_distillation import ConsistencyDistillation
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.quadrature import F64

LAM = 0.25
STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 80.0),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}


def gaussian(path: NoisePath) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[LAM]], dtype=F64), path)


class Ends(nn.Module):
    """A consistency function X = a_i x_t at each time t_i of a ladder, with free numbers a_i."""

    def __init__(self, path: NoisePath, times: list[float], gains: list[float]) -> None:
        super().__init__()
        self.path, self.times = path, torch.tensor(times, dtype=F64)
        self.gains = nn.Parameter(torch.tensor(gains, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """g = (X - A x) / B; at the end of the ladder any number, which has no part in X."""
        at = (self.times - t[:, None]).abs().argmin(1)
        s = self.times[:1]
        (alpha, alpha_s), (sigma, sigma_s) = (
            (f(t)[:, None], f(s)[:, None]) for f in (self.path.alpha, self.path.sigma)
        )
        a = sigma_s / sigma
        b = torch.where(at[:, None] > 0, alpha_s - alpha * a, 1.0)
        return torch.where(at[:, None] > 0, (self.gains[at][:, None] - a) * xt / b, 7.0)


def products(m: ConsistencyDistillation, path: NoisePath, start: float) -> list[float]:
    """a_i: the teacher's own steps from t_i to the ladder's end, one after the other."""
    times, gains = m.ladder.times(path, start), [1.0]
    teacher = gaussian(path)
    for u, t in pairwise(times):
        x, (t_, u_) = torch.ones(1, 1, dtype=F64), (torch.tensor([v], dtype=F64) for v in (t, u))
        f = teacher(x, t_)
        xu = path.ddim(x, f, t_, u_)
        if m.order == 2:
            xu = path.heun(xu, f, teacher(xu, u_), t_, u_)
        gains.append(float(xu) * gains[-1])
    return gains


def scene(m: ConsistencyDistillation, path: NoisePath, start: float) -> tuple[Any, Batch, Ends]:
    draws = Draws.range(0, 300)
    x0 = 0.5 * draws.normal("x0", (1,), F64)
    net = Ends(path, m.ladder.times(path, start), products(m, path, start))
    return gaussian(path), Batch(x0, None, x0, draws), net


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_product_of_the_solvers_steps_is_the_fixed_point(name: str, order: Any) -> None:
    """Loss and gradient are zero there, and at neither the exact flow nor a ladder's neighbour."""
    path, start = STARTS[name]
    m = ConsistencyDistillation(FewStep(start), order=order)
    teacher, batch, net = scene(m, path, start)
    total = m.student_loss(Nets({"student": net}), teacher, batch).total
    assert total is not None
    assert total.item() < 1e-20
    (gradient,) = torch.autograd.grad(total, net.gains)
    assert float(gradient.abs().max()) < 1e-9
    times = torch.tensor(m.ladder.times(path, start), dtype=F64)
    spread = (path.alpha(times) ** 2 * LAM + path.sigma(times) ** 2).sqrt()
    for wrong in (spread[0] / spread, torch.cat([net.gains[:1], net.gains.detach()[:-1]])):
        net.gains.data.copy_(wrong)
        other = m.student_loss(Nets({"student": net}), teacher, batch).total
        assert other is not None
        assert other.item() > 1e-9


@pytest.mark.parametrize(
    ("order", "levels", "ratio"),
    [
        *((1, 18, 0.84608617), (1, 40, 0.92972714), (1, 160, 0.98228582)),
        *((2, 18, 1.0552783), (2, 40, 1.0097815)),
    ],
)
def test_golden_products_on_the_published_ladder(order: Any, levels: int, ratio: float) -> None:
    """Over the exact map, from sigma 80: how far the fixed point is from the flow."""
    m = ConsistencyDistillation(FewStep(80.0), Ladder(levels - 1), order)
    exact = math.sqrt((LAM + 0.002**2) / (LAM + 80.0**2))
    assert products(m, VE(), 80.0)[-1] / exact == pytest.approx(ratio, rel=1e-7)
    times = m.ladder.times(VE(), 80.0)
    assert len(times) == levels
    assert (times[0], times[-1]) == (0.002, 80.0)
    middle = (0.002 ** (1 / 7) + (80 ** (1 / 7) - 0.002 ** (1 / 7)) * 5 / (levels - 1)) ** 7
    assert times[5] == pytest.approx(middle)


def test_training_reaches_the_product() -> None:
    """Through the loop, from another start, with the student itself as the target."""
    path, m = VE(), ConsistencyDistillation(FewStep(2.5), Ladder(3), order=1, decay=0.0)
    expected = products(m, path, 2.5)
    start = Ends(path, m.ladder.times(path, 2.5), [0.9] * 4)
    settings: Any = {"batch": 64, "optim": Optim(4e-2, (0.9, 0.99), decay="cosine")}

    def source(draws: Draws) -> Batch:
        x0 = 0.5 * draws.normal("x0", (1,), F64)
        return Batch(x0, None, x0, draws)

    *_, last = train(m, gaussian(path), start, source, steps=150, ema=EMA(0.0), **settings)
    found: Any = last.state.nets["student"]
    assert found.gains[1:].tolist() == pytest.approx(expected[1:], rel=3e-3)
    assert abs(found.gains[0] - 0.9) < 1e-9  # the boundary is no matter of the network


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_the_target_follows_the_student(decay: float) -> None:
    """By 1 - decay in a step; decay 0 is the student itself, and there is no other network."""
    m = ConsistencyDistillation(decay=decay)
    model = Model(MLP(16, 1), (1,))
    settings: Any = {"batch": 8, "optim": Optim(1e-2), "ema": EMA(0.0)}

    def source(draws: Draws) -> Batch:
        x0 = draws.normal("x0", (1,))
        return Batch(x0, None, x0, draws)

    before = [p.clone() for p in model.build().parameters()]
    (record,) = train(m, gaussian(VE()).float(), model.build(), source, steps=1, **settings)
    nets = record.state.nets
    assert set(nets) == ({"student", "target"} if decay else {"student"})
    if decay:
        rows = zip(nets["target"].parameters(), nets["student"].parameters(), before, strict=True)
        for target, student, start in rows:
            torch.testing.assert_close(target, start + 0.25 * (student - start))
        moved = zip(nets["student"].parameters(), before, strict=True)
        assert any(not torch.equal(p, start) for p, start in moved)


def test_another_distance_and_weight_and_the_jump() -> None:
    """By hand, for one pair: X = A x + B g at both ends, pseudo-Huber of root mean squares."""
    m = ConsistencyDistillation(FewStep(2.5), Ladder(4), 1, distance=PseudoHuber(0.1))
    teacher, batch, net = scene(m, VE(), 2.5)
    net.gains.data.fill_(0.8)
    at = m.pair(VE(), batch)
    xu = VE().ddim(at.xt, teacher(at.xt, at.t), at.t, at.u)
    apart = jump(net, at.xt, at.t, at.s, None) - jump(net, xu, at.u, at.s, None)
    by_hand = ((apart**2 + 0.01).sqrt() - 0.1).mean()
    found = m.student_loss(Nets({"student": net}), teacher, batch)
    torch.testing.assert_close(found.total, by_hand)
    torch.testing.assert_close(found.logs["error"], (apart**2).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"order": 3}, "order is 1 or 2"), ({"decay": 1.0}, "below 1; got 1")],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyDistillation(**settings)
