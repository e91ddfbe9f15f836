"""TBCM: on the teacher's own trajectories the consistency function has no tangent."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.types import Batch
from fewstep.distillation.angular_tangent import Point, tangent
from fewstep.distillation.flow_maps import Ladder, along_the_flow
from fewstep.distillation.method import Nets
from fewstep.methods.tbcm import TBCM
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.methods.test_battery import stirred
from tests.quadrature import F64, Even
from tests.solved_flow import SolvedFlowMap

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 0.95),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


class Ends(nn.Module):
    """Where the exact flow from x_t ends, times `size`."""

    def __init__(self, exact: Any, size: float = 1.0, end: float = 0.0) -> None:
        super().__init__()
        self.exact, self.path, self.end = exact, exact.path, end
        self.size = nn.Parameter(torch.tensor(size, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.size * self.exact(xt, t, s=torch.full_like(t, self.end))
        return out


def method(name: str, **settings: Any) -> TBCM:
    return TBCM(FewStep(STARTS[name][1]), Ladder(6), **settings)


def scene(name: str, kind: str, count: int = 20) -> tuple[Any, Any, Batch]:
    teacher: Any = TEACHERS[kind](STARTS[name][0])
    draws = Draws.range(0, count)
    exact = GaussianFlowMap(teacher) if kind == "gaussian" else SolvedFlowMap(teacher, 20)
    return teacher, exact, Batch(draws.normal("z", (2,), F64), None, None, draws)


@pytest.mark.parametrize("name", ["ve", "flow", "trig"])
def test_the_consistency_function_of_a_gaussian_is_the_fixed_point(name: str) -> None:
    """No tangent, no loss, no gradient; VP's last time has noise, and so another end."""
    teacher, exact, batch = scene(name, "gaussian")
    m = method(name)
    at, _ = m.states(teacher, batch)
    student = Ends(exact)
    scale = float(tangent(teacher, at, 0.5, 1.0, "forward").abs().mean())
    assert scale > 0.01
    assert float(tangent(student, at, 0.5, 1.0, "forward").abs().max()) < 1e-9 * scale
    nets = Nets({**m.init(teacher, student), "student": student})
    found = m.student_loss(1.0, nets, teacher, batch).total
    assert found is not None
    assert float(found.detach()) < 1e-12
    (slope,) = torch.autograd.grad(found, student.size)
    assert abs(float(slope)) < 1e-6
    assert float(tangent(student, at, 0.5, 0.5, "forward").abs().mean()) > 1e-3


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_the_consistency_function_of_a_mixture_is_the_fixed_point(name: str) -> None:
    """Where the flow ends at tau = 0.2: any end that stays is one, and this one is solved well."""
    teacher, exact, batch = scene(name, "mixture")
    path = teacher.path
    at, _ = method(name).states(teacher, batch)
    far = path.flow_time(at.t) > 0.3
    at = Point(at.xt[far], at.t[far], None, at.f[far])
    assert len(at.t) > 30

    class State(Ends):
        """g of the jump there; X is (sigma_s / sigma_t) x_t + B g, and what is constant."""

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            s = torch.full_like(t, float(path.time_of(torch.tensor(0.2, dtype=F64))))
            out: Tensor = self.exact.jump(xt, t, s)
            return out

    _, rate = along_the_flow(State(exact), at.xt, at.t, at.f, None, "forward")
    _, other = along_the_flow(teacher, at.xt, at.t, at.f, None, "forward")
    assert float(rate.abs().max()) < 1e-5
    assert float(other.abs().mean()) > 1e-2


def test_states_are_the_teachers_steps_at_the_drawn_times() -> None:
    """By hand, from pure noise; the first is not among them."""
    teacher, _, batch = scene("flow", "gaussian")
    m = method("flow")
    at, index = m.states(teacher, batch)
    path, draws = Flow(), batch.draws
    assert draws is not None
    times = m.ladder.times(path, 0.95)[::-1]
    t = torch.full((20,), 0.95, dtype=F64)
    x = 0.95 * batch.z
    for k, (high, low) in enumerate(pairwise(times)):
        then = low + draws.uniform(f"t{k}").double() * (high - low)
        x = (1 - then[:, None]) * (f := teacher(x, t)) + (then / t)[:, None] * (
            x - (1 - t[:, None]) * f
        )
        t = then
        mine = index == k
        assert int(mine.sum()) == 20
        torch.testing.assert_close(at.t[mine], t, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(at.xt[mine], x, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(at.f[mine], teacher(x, t), rtol=1e-6, atol=1e-9)
        assert bool(((t >= low) & (t <= high)).all())
    assert len(at.t) == 120
    assert float(at.t.max()) < 0.95


@pytest.mark.parametrize(("steps", "worst"), [(20, 0.12193270), (50, 0.056124576)])
def test_golden_variance_of_the_states(steps: int, worst: float) -> None:
    """Against noised data of N(0, 1/4) on TrigFlow, at the ladder's own times."""
    path = TrigFlow(0.0, math.pi / 2)
    teacher: Any = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)
    z = torch.ones(1, 1, dtype=F64)
    batch = Batch(z, None, None, Even(torch.arange(1), noise=z, share=0.0))
    at, _ = TBCM(FewStep(math.pi / 2), Ladder(steps)).states(teacher, batch)
    exact = 0.25 * at.t.cos() ** 2 + at.t.sin() ** 2
    off = (at.xt[:, 0] ** 2 / exact - 1).abs()[:-1]  # the last one is data
    assert float(off.max()) == pytest.approx(worst, rel=1e-6)


@each_path
def test_the_loss_is_that_of_scm_at_all_states(name: str) -> None:
    """One mean over B N states, brought to one size in each interval."""
    teacher, _, batch = scene(name, "gaussian")
    m = method(name, c=0.3)
    nets = m.init(teacher, nn.Identity())
    nets["student"] = student = Ends(GaussianFlowMap(teacher), 0.8, STARTS[name][0].t_min)
    at, index = m.states(teacher, batch)
    g = tangent(student, at, 0.5, 0.7, "forward")
    size = g.square().sum(1, keepdim=True).sqrt()
    levels = teacher.path.sigma(at.t) / teacher.path.alpha(at.t)
    each = ((g / (size + 0.3)) ** 2).mean(1) / levels
    found = m.student_loss(0.7, nets, teacher, batch)
    assert found.total is not None
    torch.testing.assert_close(found.total.detach(), each.mean())
    assert found.sums["count"].tolist() == [20.0] * 6
    sums = torch.stack([each[index == k].sum() for k in range(6)])
    torch.testing.assert_close(found.sums["total"], sums)
    kept: Any = nets["level"]
    kept.follow(found.sums["count"], found.sums["total"], 0.95)
    again = m.student_loss(0.7, nets, teacher, batch).total
    assert again is not None
    assert float(again.detach()) == pytest.approx(1, rel=1e-5)


def test_guidance_is_the_teachers() -> None:
    """In the steps and in the predictions that are followed."""
    net: Any = stirred(Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2), 2).double()
    draws = Draws.range(0, 30)
    batch = Batch(draws.normal("z", (2,), F64), draws.integers("label", 3), None, draws)
    m = method("flow", kappa=2.5)
    at, _ = m.states(net, batch)
    assert torch.equal(at.cond, batch.cond.repeat(6))
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, at.cond)
    torch.testing.assert_close(at.f, free + 2.5 * (told - free))
    plain, _ = replace(m, kappa=1.0).states(net, batch)
    assert float((plain.xt - at.xt).abs().mean()) > 1e-3
    assert torch.equal(plain.t, at.t)


def test_it_needs_no_data_and_warms_up() -> None:
    assert not TBCM().needs_data
    shares = [TBCM(warmup=10).turns(step)[0].loss.args[0] for step in (0, 5, 10, 20)]  # type: ignore[attr-defined]
    assert shares == [0.0, 0.5, 1.0, 1.0]
    assert TBCM(warmup=0).turns(0)[0].loss.args == (1.0,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data > 0"),
        ({"c": 0.0}, "c > 0"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TBCM(**settings)
    with pytest.raises(ValueError, match="sampled by FewStep or Jumps"):
        TBCM(Heun()).states(*scene("flow", "gaussian")[::2])
