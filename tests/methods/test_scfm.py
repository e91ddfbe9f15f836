"""SCFM: targets are two steps made one; without a step input the fixed point is their mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets, Step
from fewstep.methods.scfm import SCFM, Steps
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.maps import Point, scene
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 20.0),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}


class Towards(nn.Module):
    """The flow map of a Gaussian, told s by the steps of a grid that is asked at t or m."""

    def __init__(self, exact: GaussianFlowMap, count: int) -> None:
        super().__init__()
        self.exact, self.path, self.count = exact, exact.path, count

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        s = self.path.time_of(self.path.flow_time(t) - 1 / self.count)
        out: Tensor = self.exact(xt, t, s=s)
        return out


def method(name: str = "flow", **settings: Any) -> SCFM:
    return SCFM(FewStep(STARTS[name][1], 4, "ddim"), **settings)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_the_target_is_two_steps_in_one(name: str, count: int) -> None:
    """The teacher's and the slow average's on its grid, the fast and the slow one's elsewhere."""
    m = method(name)
    path = STARTS[name][0]
    teacher, batch = scene(path, "mixture", 50)
    one, other = TEACHERS["gaussian"](path), TEACHERS["ring"](path)
    nets: Any = {"fast": one, "slow": other}
    at = m.steps(count, path, batch)
    assert bool(((at.t > at.m) & (at.m > at.s)).all())
    found = path.ddim(at.xt, m.target(count, nets, teacher, at, batch), at.t, at.s)
    first = teacher if count == 32 else one
    xm = path.ddim(at.xt, first(at.xt, at.t), at.t, at.m)
    torch.testing.assert_close(found, path.ddim(xm, other(xm, at.m), at.m, at.s))


def test_grids_are_even_in_flow_time_but_for_their_shift() -> None:
    """And begin everywhere but at the last step; each sample has a shift of its own."""
    _, batch = scene(VE(), count=300)
    plain = SCFM(FewStep(2.5, 4, "ddim"), shift=(1.0, 1.0)).steps(4, VE(), batch)
    top = 2.5 / 3.5
    tau = VE().flow_time(plain.t) / top
    assert set((4 * tau).round().tolist()) == {4.0, 3.0, 2.0}
    assert float((4 * tau - (4 * tau).round()).abs().max()) < 1e-6
    torch.testing.assert_close(VE().flow_time(plain.m), (tau - 0.25) * top)
    low = (tau - 0.5) * top
    torch.testing.assert_close(VE().flow_time(plain.s), low.clamp(min=0.002 / 1.002))
    at = SCFM(FewStep(2.5, 4, "ddim"), shift=(1.0, 3.0)).steps(4, VE(), batch)
    middle = VE().flow_time(at.t)[tau < 0.6] / top
    assert 0.5 < float(middle.min()) < 0.55
    assert 0.7 < float(middle.max()) < 0.75


def test_golden_mean_of_the_steps() -> None:
    """N(0, 1/4) on a flow, from t = 1: velocities of steps 1, 1/2, 1/4 and 1/8, and their mean."""
    path, m = Flow(0.0), method(shift=(1.0, 1.0))
    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)
    z = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    exact, one = GaussianFlowMap(teacher), torch.ones(9, dtype=F64)
    slopes, gradients = [], []
    mean = torch.tensor(1 - 0.16931242, dtype=F64, requires_grad=True)
    for count in (2, 4, 8, 16):
        nets = Nets({"fast": Towards(exact, count), "slow": Towards(exact, count)})
        at = Steps(z, one, one - 1 / count, one - 2 / count)
        g = m.target(count, nets, teacher, at, Batch(z))
        slopes.append(float(((z - g) / z)[0]))
        loss = ((mean * z - (z - g)) ** 2).mean()
        gradients.append(torch.autograd.grad(loss, mean)[0])
    assert slopes == pytest.approx([0.5, 0.8820, 0.9586, 0.9822], abs=5e-5)
    assert 1 - sum(slopes) / 4 == pytest.approx(0.16931242, abs=1e-6)
    assert abs(float(sum(gradients))) < 1e-6
    assert min(abs(float(g)) for g in gradients) > 0.05  # of one step alone it is not zero


@pytest.mark.parametrize("name", STARTS)
def test_a_straight_flow_is_the_fixed_point(name: str) -> None:
    """Loss below 1e-18 and no gradient for every grid; a curved flow's denoiser has both."""
    path = STARTS[name][0]
    m, (teacher, batch) = method(name), scene(path)
    for count in (2, 4, 8, 16, 32):
        net: Any = Point(teacher)
        nets = Nets({"student": net, "fast": net, "slow": net})
        total = m.student_loss(count, nets, net, batch).total
        assert total is not None
        assert total.item() < 1e-18
        assert float(torch.autograd.grad(total, net.shift)[0].abs().max()) < 1e-8
        nets = Nets({"student": teacher, "fast": teacher, "slow": teacher})
        curved = m.student_loss(count, nets, teacher, batch).total
        assert curved is not None
        assert curved.item() > 1e-5


def test_the_loss_is_of_velocities() -> None:
    """A student off by b in x_0 is off by b / tau."""
    m, (teacher, batch) = method(shift=(1.0, 1.0)), scene(Flow())
    off: Any = Point(teacher)
    on: Any = Point(teacher)
    off.shift.data.fill_(0.3)
    nets = Nets({"student": off, "fast": on, "slow": on})
    at = m.steps(4, Flow(), batch)
    total = m.student_loss(4, nets, on, batch).total
    torch.testing.assert_close(total, (0.09 / at.t**2).mean())


def test_averages_and_the_grids_of_steps() -> None:
    m = SCFM(fast=0.5, slow=0.75)
    net = Model(MLP(16, 1), (2,)).build()
    nets = m.init(None, net)
    for p in nets["student"].parameters():
        p.data += 1
    m.after_step(Step(nets, net, 0, 0, 0, {}))
    for name, rest in (("fast", 0.5), ("slow", 0.75)):
        rows = zip(nets[name].parameters(), nets["student"].parameters(), strict=True)
        assert all(torch.allclose(a, b - rest, atol=1e-6) for a, b in rows)
    grids = [m.grid(k) for k in range(400)]
    assert set(grids) == {2, 4, 8, 16, 32}
    assert grids.count(32) / 400 == pytest.approx(0.4, abs=0.08)
    assert [turn.loss.args for turn in m.turns(7)] == [(m.grid(7),)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grids": ()}, "two steps or more"),
        ({"grids": (1, 2)}, "two steps or more"),
        ({"teacher_steps": 1}, "two steps or more"),
        ({"teacher_share": 0.0}, "above 0 and at most 1"),
        ({"shift": (2.0, 1.0)}, "two positive numbers"),
        ({"fast": 1.0}, "below 1"),
        ({"slow": -0.1}, "at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCFM(**settings)


def test_a_sampler_without_a_ladder_is_refused() -> None:
    _, batch = scene(VE())
    with pytest.raises(ValueError, match="sampled by FewStep or Jumps"):
        SCFM(Heun()).steps(4, VE(), batch)
