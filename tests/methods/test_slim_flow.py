"""SlimFlow: what annealed pairs teach, to the last bit, and a flow that guides its own end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.distillation.pairs import Pairs
from fewstep.methods.slim_flow import SlimFlow
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.quadrature import F64, batch, quantiles

ENDS = {"flow": (Flow(), 1.0), "trig": (TrigFlow(), math.pi / 2), "ve": (VE(), 80.0)}
PARTS = {0.0: 0.5, 0.5: 0.4330127, 0.9: 0.21794495}
"""Golden: b, and the standard deviation of one step of the flow that it teaches on N(0, 1/4)."""


class Straight(nn.Module):
    """E[y | x_t] on the lines from z to y = r z + (1/4 - r^2)^(1/2) n, plus a x_t and a shift."""

    def __init__(self, path: NoisePath, r: float) -> None:
        super().__init__()
        self.path, self.r = path, r
        self.off = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, sigma = (expand(c(t), xt) for c in (self.path.alpha, self.path.sigma))
        common = alpha / 4 + sigma * self.r
        exact = xt * common / (alpha**2 / 4 + 2 * alpha * sigma * self.r + sigma**2)
        return exact + self.off[0] * xt + self.off[1]


def pull(student: Straight, total: Tensor | None) -> float:
    """The largest part of the gradient in the student's two freedoms."""
    assert total is not None
    (found,) = torch.autograd.grad(total, student.off)
    return float(found.abs().max())


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("share", PARTS)
def test_what_annealed_pairs_teach(name: str, share: float) -> None:
    """No mean gradient at the lines' exact mean, at any tau; its one step has the golden std."""
    path, start = ENDS[name]
    r = 0.5 * math.sqrt(1 - share**2)
    student: Any = Straight(path, r)
    made = FewStep(start)(student, torch.ones(1, 1, dtype=F64))
    assert float(made.detach()) == pytest.approx(PARTS[share], abs=1e-2 if name == "ve" else 1e-7)
    pairs = batch(60)
    pairs = pairs._replace(more={"pair_z": pairs.z, "pair_x0": pairs.z / 2})
    for tau in (0.2, 0.7):
        m: Any = SlimFlow(FewStep(start), times=Discrete((tau,)))
        nets = Nets({"student": student})
        assert pull(student, m.reflow_loss(share, nets, student, pairs).total) < 1e-12
        other: Any = Straight(path, r - 0.1)
        assert (
            pull(other, m.reflow_loss(share, Nets({"student": other}), other, pairs).total) > 0.01
        )


def test_the_first_step_is_flow_matching() -> None:
    """b = 1: on pairs of a mixture the teacher's own denoiser has no gradient, to 2e-3."""
    teacher = GaussianMixture(
        torch.tensor([[-0.7], [0.9]], dtype=F64), torch.tensor(0.04, dtype=F64), path=Flow()
    )
    points = quantiles(500)
    y = torch.cat([0.2 * points - 0.7, 0.2 * points + 0.9])
    y, eps = (g.reshape(-1, 1) for g in torch.meshgrid(y, points, indexing="ij"))

    class Around(Straight):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return teacher(xt, t) + self.off[0] * xt + self.off[1]

    student: Any = Around(Flow(), 0.0)
    given = batch(2)
    draws: Any = given.draws
    draws = type(draws)(torch.arange(len(y)), noise=eps)
    m: Any = SlimFlow(FewStep(1.0), times=Discrete((0.6,)))
    pairs = Batch(y, None, None, draws, {"pair_z": torch.zeros_like(y), "pair_x0": y})
    nets = Nets({"student": student})
    assert pull(student, m.reflow_loss(1.0, nets, student, pairs).total) < 2e-3
    assert pull(student, m.reflow_loss(0.9, nets, student, pairs).total) > 0.05


@pytest.mark.parametrize("name", ENDS)
def test_a_straight_flow_is_the_zero_of_the_distillation(name: str) -> None:
    """Both terms; where the flow is not straight, it is the two-step end that is learnt."""
    path, start = ENDS[name]
    m: Any = SlimFlow(FewStep(start))
    z = quantiles(50)[:, None]
    given = Batch(z, None, None, Draws.range(0, 50), {"pair_z": z, "pair_x0": z / 2})
    exact: Any = Straight(path, 0.5)
    made = m.end_loss(Nets({"student": exact, "flow": exact}), exact, given).logs
    near = 1e-4 if name == "ve" else 1e-15  # from sigma = 80 a hundredth of y is still there
    assert made["pairs"].item() < near
    assert made["guide"].item() < near
    other: Any = Straight(path, 0.2)
    made = m.end_loss(Nets({"student": exact, "flow": other}), exact, given).logs
    assert made["guide"].item() > 1e-3


@pytest.mark.parametrize("tau", [0.3, 0.6])
def test_the_guide_is_the_mean_velocity_of_two_steps(tau: float) -> None:
    """(z - x) of two Euler steps on Flow, the first the student's own; no gradient."""
    student: Any = Straight(Flow(), 0.1)
    flow: Any = Straight(Flow(), 0.4)
    m: Any = SlimFlow(FewStep(1.0))
    given = batch(10)
    draws: Any = given.draws
    given = given._replace(
        draws=type(draws)(draws.index, noise=draws.noise, share=(tau - 0.2) / 0.6)
    )
    z = given.z
    nets = Nets({"student": student, "flow": flow})
    end = m.two_calls(nets, student(z, torch.ones(len(z), dtype=F64)), given)
    v1 = z - student(z, torch.ones(len(z), dtype=F64))
    x = z - (1 - tau) * v1
    at = torch.full((len(z),), tau, dtype=F64)
    v2 = (x - flow(x, at)) / tau
    mean = (1 - tau) * v1 + tau * v2
    torch.testing.assert_close(z - end, mean.detach(), rtol=1e-7, atol=1e-7)
    assert not end.requires_grad


def test_b_falls_as_the_released_code_has_it() -> None:
    """Linear, cosine and exponential, at a quarter, all and twice of the annealing."""
    want = {
        "linear": (1.0, 0.75, 0.0, 0.0),
        "cos": (1.0, (1 + math.cos(math.pi / 4)) / 2, 0.0, 0.0),
        "exp": (1.0, math.exp(-0.25), math.exp(-1), math.exp(-2)),
    }
    for schedule, shares in want.items():
        m = SlimFlow(schedule=schedule, anneal_steps=100)  # type: ignore[arg-type]
        assert [m.share(k) for k in (0, 25, 100, 200)] == pytest.approx(shares, abs=1e-12)


MODEL = Model(MLP(16, 1), (1,), 0, Flow(), "velocity")


def test_the_flow_is_the_students_average_from_the_distillation_on() -> None:
    """A copy at step 0, the average when the lines are done, the same from then on."""
    m = SlimFlow(FewStep(1.0), reflow_steps=2, anneal_steps=1, distil_steps=3)
    assert m.length == 5
    names = [
        getattr(getattr(m.turns(k)[0].loss, "func", m.turns(k)[0].loss), "__name__", "")
        for k in range(5)
    ]
    assert names == ["reflow_loss"] * 2 + ["end_loss"] * 3

    def source(draws: Draws) -> Batch:
        z = draws.normal("z", (1,))
        return Batch(z, None, None, draws, {"pair_z": z, "pair_x0": z / 2})

    net: Any = MODEL.build()
    averages, flows, restarts = [], [], []
    for r in train(m, net, net, source, batch=4, steps=5, optim=Optim(1e-2), ema=EMA(50.0)):
        averages.append([p.clone() for p in r.state.average.parameters()])
        flows.append([p.clone() for p in r.state.nets["flow"].parameters()])
        restarts.append(r.restarted)
    assert restarts == [(), ("student",), (), (), ()]
    same = [all(map(torch.equal, flows[k], flows[1])) for k in range(5)]
    assert same == [False, True, True, True, True]
    assert all(map(torch.equal, flows[0], net.parameters()))
    assert not all(map(torch.equal, flows[1], net.parameters()))
    assert not all(map(torch.equal, flows[1], averages[1]))  # which is the student, begun anew


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": FewStep(80.0, 4, "ddim")}, "is a FewStep of one call"),
        ({"sampler": Heun()}, "is a FewStep of one call"),
        ({"anneal_steps": 0}, "of 1 or more and a guide"),
        ({"guide": -1.0}, "of 1 or more and a guide"),
        ({"schedule": "sine"}, "'linear', 'cos' or 'exp'"),
        ({"span": (0.8, 0.2)}, "0 < low < high < 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimFlow(**settings)
    assert SlimFlow(pairs=Pairs(7)).needs_pairs() == Pairs(7)
