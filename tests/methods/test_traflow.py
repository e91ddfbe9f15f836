"""TraFlow: the exact flow map is the zero of each of its terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, expand
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import flow_end
from fewstep.distillation.method import Nets
from fewstep.methods.traflow import Stretch, TraFlow
from fewstep.nets.mlp import MLP
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.methods.test_battery import stirred
from tests.quadrature import F64
from tests.solved_flow import SolvedFlowMap

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)
each_solved = pytest.mark.parametrize("name", ["ve", "flow"])


class Off(nn.Module):
    """An exact flow map plus `shift` times the flow time that is jumped over, if it knows s."""

    def __init__(self, exact: Any, shift: float = 0.0, deaf: bool = False) -> None:
        super().__init__()
        self.exact, self.path, self.deaf = exact, exact.path, deaf
        self.shift = nn.Parameter(torch.tensor(shift, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
        if self.deaf:
            return self.exact.teacher(xt, t) + 0 * self.shift  # type: ignore[no-any-return]
        apart = expand(self.path.flow_time(t) - self.path.flow_time(s), xt)
        out: Tensor = self.exact(xt, t, s=s) + self.shift * apart
        return out


def method(name: str, **settings: Any) -> TraFlow:
    return TraFlow(Jumps(STARTS[name][1]), **settings)


def scene(name: str, kind: str, count: int = 60) -> tuple[Any, Any, Batch]:
    """A teacher, its flow map, and data of about its law."""
    teacher: Any = TEACHERS[kind](STARTS[name][0])
    draws = Draws.range(0, count)
    x0 = teacher.sample(count, torch.Generator().manual_seed(0)).double()
    exact = GaussianFlowMap(teacher) if kind == "gaussian" else SolvedFlowMap(teacher, 16)
    return teacher, exact, Batch(x0, None, x0, draws)


def exactly(at: Stretch, exact: Any) -> Stretch:
    """The stretch with the flow itself in place of the solver's steps."""
    return at._replace(
        xu=exact.jump(at.xt, at.t, at.u).detach(), xs=exact.jump(at.xt, at.t, at.s).detach()
    )


@each_path
def test_the_exact_flow_map_of_a_gaussian_has_no_loss_and_no_gradient(name: str) -> None:
    teacher, exact, batch = scene(name, "gaussian")
    m = method(name, diagonal=0.3)
    at = exactly(m.stretch(teacher, batch), exact)
    assert bool(((at.s <= at.u) & (at.u <= at.t)).all())
    assert 0.15 < float((at.s == at.t).double().mean()) < 0.45
    student = Off(exact)
    terms = m.terms(Nets({"student": student}), teacher, at)
    for term in terms:
        assert float(term.detach().max()) < 1e-12
        (slope,) = torch.autograd.grad(term.mean(), student.shift, retain_graph=True)
        assert abs(float(slope)) < 1e-6
    for wrong in (Off(exact, 0.1), Off(exact, deaf=True)):
        found = m.terms(Nets({"student": wrong}), teacher, at)
        assert min(float(term.detach().mean()) for term in found) > 1e-5


@each_solved
def test_the_solved_flow_map_of_a_mixture_has_no_loss(name: str) -> None:
    """To what the reference solver leaves, away from the data, where its step is coarse."""
    teacher, exact, batch = scene(name, "mixture", 20)
    m = method(name, diagonal=0.0)
    at = m.stretch(teacher, batch)
    path = teacher.path
    low = 0.15 + 0.7 * path.flow_time(at.s)
    s, t = path.time_of(low), path.time_of(low + 0.3)
    at = exactly(at._replace(s=s, u=path.time_of(low + 0.2), t=t), exact)
    terms = m.terms(Nets({"student": Off(exact)}), teacher, at)
    assert max(float(term.detach().max()) for term in terms) < 1e-9
    found = m.terms(Nets({"student": Off(exact, deaf=True)}), teacher, at)
    assert min(float(term.detach().mean()) for term in found) > 1e-5


def test_the_terms_by_hand() -> None:
    """On a rectified flow, where y is x_t: G = x - (t - s) u and dG/ds by forward mode."""
    teacher, exact, batch = scene("flow", "gaussian")
    m = method("flow", endpoint=0.5, velocity=2.0, consistency=3.0)
    at, student = m.stretch(teacher, batch), Off(exact, 0.2)
    t, s = at.t[:, None], at.s[:, None]

    def made(s: Tensor) -> Tensor:
        return at.xt - (t - s) * (at.xt - student(at.xt, at.t, s=s[:, 0])) / t

    end, rate = torch.func.jvp(made, (s,), (torch.ones_like(s),))  # type: ignore[misc]
    speed = (end - teacher(end, at.s)) / s
    again = at.xu - (at.u[:, None] - s) * (at.xu - student(at.xu, at.u, s=at.s)) / at.u[:, None]
    by_hand = [(end - at.xs), (rate - speed), (end - again)]
    terms = m.terms(Nets({"student": student}), teacher, at)
    for term, apart in zip(terms, by_hand, strict=True):
        torch.testing.assert_close(term, (apart**2).mean(1), rtol=1e-7, atol=1e-12)
    total = m.student_loss(Nets({"student": student}), teacher, batch)
    assert total.total is not None
    squares = [float((apart**2).detach().mean()) for apart in by_hand]
    expected = 0.5 * squares[0] + 2 * squares[1] + 3 * squares[2]
    assert float(total.total.detach()) == pytest.approx(expected, rel=1e-7)
    assert float(total.logs["consistency"].detach()) == pytest.approx(squares[2], rel=1e-7)


def test_the_gradient_is_that_of_a_regression() -> None:
    """Through G and u alone: each term's slope is 2 <difference, d/dshift of its own side>."""
    teacher, exact, batch = scene("flow", "gaussian")
    m, student = method("flow", diagonal=0.0), Off(exact, 0.2)
    at = m.stretch(teacher, batch)
    with torch.no_grad():
        moved = m.moved(student, teacher, at)
    t, s = at.t[:, None], at.s[:, None]
    u = (at.xt - student(at.xt, at.t, s=at.s)) / t
    again = at.xu - (at.u[:, None] - s) * (at.xu - student(at.xu, at.u, s=at.s)) / at.u[:, None]
    own = -(t - s) / t  # du / dshift
    hand = [
        (at.xt - (t - s) * u - at.xs, -(t - s) * own),
        (u - moved, own),
        (at.xt - (t - s) * u - again, -(t - s) * own),
    ]
    terms = m.terms(Nets({"student": student}), teacher, at)
    for term, (apart, slope) in zip(terms, hand, strict=True):
        (found,) = torch.autograd.grad(term.mean(), student.shift, retain_graph=True)
        assert float(found) == pytest.approx(float((2 * apart * slope).mean()), rel=1e-9)


@each_path
def test_the_solver_comes_to_the_flow(name: str) -> None:
    """To second order by Heun's method, to first by DDIM, over a stretch of moderate noise."""
    teacher, exact, batch = scene(name, "gaussian")
    path = teacher.path
    tau = torch.full((60,), 0.5, dtype=F64)
    t, s = path.time_of(tau), path.time_of(tau - 0.25)
    end, ratios = exact.jump(batch.z, t, s), {}
    for order in (1, 2):
        errors = [
            float((flow_end(teacher, batch.z, t, s, None, 1.0, n, order) - end).abs().max())
            for n in (8, 16)
        ]
        ratios[order] = errors[0] / errors[1]
    assert ratios[1] == pytest.approx(2, rel=0.15)
    assert ratios[2] == pytest.approx(4, rel=0.25)


@each_path
def test_differences_in_place_of_forward_mode(name: str) -> None:
    teacher, exact, batch = scene(name, "gaussian")
    m = method(name)
    at, student = m.stretch(teacher, batch), Off(exact, 0.2)
    forward = m.moved(student, teacher, at)
    difference = replace(m, derivative="difference").moved(student, teacher, at)
    apart = (difference - forward).abs()
    assert 0 < float(apart.median()) < 1e-4  # VP's rates jump at whole timesteps


def test_guidance_is_the_teachers() -> None:
    """In the solver's steps and in the velocity at the end."""
    net: Any = stirred(Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2), 2).double()
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)

    class Guided(nn.Module):
        path = net.path

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            free = net(xt, t, None)
            return free + 2.5 * (net(xt, t, cond) - free)  # type: ignore[no-any-return]

    m = method("flow", kappa=2.5, diagonal=0.0)
    nets = m.init(net, net)
    found = m.student_loss(nets, net, batch)
    by_hand = replace(m, kappa=1.0).student_loss(nets, Guided(), batch)  # type: ignore[arg-type]
    for name, value in found.logs.items():
        assert float(value) == pytest.approx(float(by_hand.logs[name]), rel=1e-9)
    plain = replace(m, kappa=1.0).student_loss(nets, net, batch)
    assert abs(float(plain.logs["velocity"]) / float(found.logs["velocity"]) - 1) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoint": -1.0}, "weights of 0 or more"),
        ({"endpoint": 0.0, "velocity": 0.0}, "consistency alone is zero"),
        ({"diagonal": 1.0}, "diagonal in"),
        ({"steps": 0}, "steps >= 1"),
        ({"order": 3}, "order is 1 or 2"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TraFlow(**settings)


def test_the_student_starts_as_the_teacher() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    student: Any = TraFlow().init(net, net)["student"]
    draws = Draws.range(0, 4)
    x, t, cond = draws.normal("x", (2,)), draws.uniform("t"), draws.integers("label", 3)
    assert torch.equal(student(x, t, cond, s=t / 2), net(x, t, cond))
    assert TraFlow().result(model) == replace(model, inputs=("s",))
