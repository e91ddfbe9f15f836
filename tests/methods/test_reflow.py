"""Reflow: straight lines of exact pairs of a Gaussian, and what one Euler step makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow, expand, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.distillation.pairs import Pairs
from fewstep.methods.reflow import Reflow
from fewstep.nets.mlp import MLP
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.quadrature import F64

LAW = Uniform(0.02, 0.98)
ENDS = {"flow": (Flow(), 1.0), "trig": (TrigFlow(), 1.5707963267948966), "ve": (VE(), 80.0)}


class Straight(nn.Module):
    """E[y | x_t] on the lines from z to y = r z + (1/4 - r^2)^(1/2) n, n normal.

    r = 1/2: the exact pairs of N(0, 1/4). r = 0: noise and data that know nothing of one another.
    """

    def __init__(self, path: NoisePath, r: float) -> None:
        super().__init__()
        self.path, self.r = path, r

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, sigma = (expand(c(t), xt) for c in (self.path.alpha, self.path.sigma))
        common = alpha / 4 + sigma * self.r
        return xt * common / (alpha**2 / 4 + 2 * alpha * sigma * self.r + sigma**2)


def pairs(r: float, count: int = 4000) -> Batch:
    draws = Draws.range(0, count)
    z, n = draws.normal("pair/z", (1,), F64), draws.normal("pair/n", (1,), F64)
    y = r * z + (0.25 - r**2) ** 0.5 * n
    return Batch(z, None, None, draws, {"pair_z": z, "pair_x0": y})


def loss(student: nn.Module, batch: Batch) -> float:
    m: Any = Reflow(times=LAW)
    total = m.line_loss(Nets({"student": student}), student, batch).total
    return float(total)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(("r", "one_step"), [(0.5, 0.5), (0.0, 0.0)])
def test_one_step_after_the_exact_reflow(name: str, r: float, one_step: float) -> None:
    """Golden: 1/2 from exact pairs, on every path; the first flow, from none, gives the mean."""
    path, start = ENDS[name]
    student: Any = Straight(path, r)
    z = torch.ones(1, 1, dtype=F64)
    near = 0.01 if path == VE() else 1e-9
    assert float(FewStep(start)(student, z)) == pytest.approx(one_step, abs=near)
    if r:
        for steps in (2, 5):
            many = FewStep(start, steps, "ddim")
            assert float(many(student, z)) == pytest.approx(0.5, abs=near)


@pytest.mark.parametrize("name", ENDS)
def test_the_straight_flow_is_the_zero_of_exact_pairs(name: str) -> None:
    path, _ = ENDS[name]
    assert loss(Straight(path, 0.5), pairs(0.5)) < 1e-20
    assert loss(Straight(path, 0.0), pairs(0.5)) > 0.05  # the teacher's own denoiser is not


@pytest.mark.parametrize("path", [Flow(), VE()], ids=repr)
def test_the_loss_is_that_of_the_velocity(path: NoisePath) -> None:
    """|v - (z - y)|^2 with v = (x_t / (alpha + sigma) - g) / tau, at the drawn flow times."""
    batch = pairs(0.5, 50)
    student: Any = Straight(path, 0.2)
    draws: Any = batch.draws
    tau = LAW.quantile(draws.uniform("tau").to(F64))
    t = path.time_of(tau)
    z, y = batch.more["pair_z"], batch.more["pair_x0"]
    xt = perturb(path, y, z, t)
    scaled = xt / (path.alpha(t) + path.sigma(t))[:, None]
    v = (scaled - student(xt, t)) / tau[:, None]
    by_hand = ((v - (z - y)) ** 2).mean()
    assert loss(student, batch) == pytest.approx(float(by_hand), rel=1e-5)
    assert loss(student, pairs(0.1, 50)) != pytest.approx(float(by_hand), rel=1e-2)


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5])
def test_its_minimum_is_the_mean_of_the_lines_that_cross(r: float) -> None:
    """The regression's residual has no part in x_t or in 1, at any time; another r's has."""
    batch = pairs(r, 200_000)
    draws: Any = batch.draws
    t = LAW.quantile(draws.uniform("tau").to(F64))
    z, y = batch.more["pair_z"], batch.more["pair_x0"]
    xt = perturb(Flow(), y, z, t)
    for known, right in ((r, True), (0.35, False)):
        left = (Straight(Flow(), known)(xt, t) - y) / t[:, None]
        moments = torch.stack([(left * xt).mean(), (left * xt * t[:, None]).mean(), left.mean()])
        assert (float(moments.abs().max()) < 6e-3) == right


MODEL = Model(MLP(16, 1), (1,), 0, Flow(), "velocity")


def test_the_distillation_begins_anew() -> None:
    m = Reflow(FewStep(1.0), reflow_steps=2, distil_steps=3)
    assert m.length == 5
    names = [getattr(m.turns(step)[0].loss, "__name__", "") for step in range(5)]
    assert names == ["line_loss"] * 2 + ["end_loss"] * 3

    def source(draws: Draws) -> Batch:
        z = draws.normal("z", (1,))
        return Batch(z, None, None, draws, {"pair_z": z, "pair_x0": z / 2})

    net: Any = MODEL.build()
    records = train(m, net, net, source, batch=4, steps=5, optim=Optim(1e-2), ema=EMA(0.0))
    assert [r.restarted for r in records] == [(), ("student",), (), (), ()]


def test_the_end_is_the_samplers_call() -> None:
    """|G(z) - y|^2 at tau = 1: 0 for the straight flow, (r - 1/2)^2 + 1/4 - r^2 for others."""
    m: Any = Reflow(FewStep(1.0))
    for r in (0.5, 0.2):
        student: Any = Straight(Flow(), r)
        total = m.end_loss(Nets({"student": student}), student, pairs(0.5, 40_000)).total
        assert float(total) == pytest.approx((r - 0.5) ** 2, rel=2e-2, abs=1e-12)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="distils one call, but its sampler makes 4"):
        Reflow(FewStep(80.0, 4, "ddim"))
    with pytest.raises(ValueError, match="of 0 or more, got -1 and 900"):
        Reflow(reflow_steps=-1)
    assert Reflow(FewStep(80.0, 4, "ddim"), distil_steps=0).length is None
    assert Reflow(pairs=Pairs(7, Heun())).needs_pairs() == Pairs(7, Heun())
