"""SCFlow: the consistency function is the zero of both directions as steps become short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import jump
from fewstep.distillation.method import Nets
from fewstep.losses.adversarial import GradientPenalty
from fewstep.methods.scflow import Neighbours, SCFlow
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


class Ends(nn.Module):
    """The exact consistency function, times `size`."""

    def __init__(self, exact: Any, size: float = 1.0) -> None:
        super().__init__()
        self.exact, self.path = exact, exact.path
        self.size = nn.Parameter(torch.tensor(size, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        s = torch.full_like(t, self.path.t_min)
        out: Tensor = self.size * self.exact(xt, t, s=s)
        return out


def method(name: str, **settings: Any) -> SCFlow:
    plain: dict[str, Any] = {"line": 0.0, "gan": 0.0, "decay": 0.0}
    return SCFlow(FewStep(STARTS[name][1]), **(plain | settings))


def scene(name: str, kind: str, count: int = 80) -> tuple[Any, Any, Batch]:
    teacher: Any = TEACHERS[kind](STARTS[name][0])
    draws = Draws.range(0, count)
    x0 = teacher.sample(count, torch.Generator().manual_seed(0)).double()
    exact = GaussianFlowMap(teacher) if kind == "gaussian" else SolvedFlowMap(teacher, 30)
    return teacher, exact, Batch(draws.normal("z", (2,), F64), None, x0, draws)


def apart(m: SCFlow, student: nn.Module, at: Neighbours, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The differences that d is of."""
    below, above = m.targets(Nets({"student": student}), at, x0)
    made = jump(student, at.xt, at.t, at.s, None)
    return made - below, made - above


def exactly(at: Neighbours, exact: Any) -> Neighbours:
    """The flow itself in place of the teacher's steps."""
    with torch.no_grad():
        return at._replace(
            below=exact.jump(at.xt, at.t, at.low), above=exact.jump(at.xt, at.t, at.high)
        )


@each_path
def test_the_consistency_function_of_a_gaussian_is_the_fixed_point(name: str) -> None:
    """With the exact flow for a step both differences and their gradients are zero."""
    teacher, exact, batch = scene(name, "gaussian")
    m = method(name)
    assert batch.x0 is not None
    at = m.neighbours(teacher, batch)
    tau = [teacher.path.flow_time(time) for time in (at.low, at.t, at.high)]
    assert bool(((tau[0] <= tau[1]) & (tau[1] <= tau[2])).all())
    assert 0.1 < float((tau[1] - tau[0]).max()) < 0.2 + 1e-6
    assert 0.1 < float((tau[2] - tau[1]).max()) < 0.2 + 1e-6
    student = Ends(exact)
    for difference in apart(m, student, exactly(at, exact), batch.x0):
        assert float(difference.detach().abs().max()) < 1e-9
        loss = (difference**2).mean()
        (slope,) = torch.autograd.grad(loss, student.size, retain_graph=True)
        assert abs(float(slope)) < 1e-9
    for difference in apart(m, Ends(exact, 0.9), exactly(at, exact), batch.x0):
        assert float(difference.detach().abs().mean()) > 1e-4


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_the_consistency_function_of_a_mixture_is_the_fixed_point(name: str) -> None:
    """To what the reference solver leaves."""
    teacher, exact, batch = scene(name, "mixture", 30)
    m, path = method(name), teacher.path
    assert batch.x0 is not None
    at = m.neighbours(teacher, batch)
    tau = 0.45 + 0.2 * path.flow_time(at.t)
    t, low, high = (path.time_of(tau + shift) for shift in (0.0, -0.1, 0.1))
    end = torch.full_like(t, float(path.time_of(torch.tensor(0.2, dtype=F64))))
    at = exactly(at._replace(t=t, low=low, high=high, s=end), exact)

    class To(Ends):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            out: Tensor = self.exact(xt, t, s=end)
            return out

    for difference in apart(m, To(exact), at, batch.x0):
        assert float(difference.detach().abs().max()) < 1e-7

    class Guess(Ends):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            out: Tensor = teacher(xt, t)
            return out

    for difference in apart(m, Guess(exact), at, batch.x0):
        assert float(difference.detach().abs().mean()) > 1e-3


@each_path
def test_the_teachers_step_is_off_by_the_square_of_its_length(name: str) -> None:
    teacher, exact, batch = scene(name, "gaussian")
    assert batch.x0 is not None
    sizes = []
    for reach in (0.02, 0.01):
        m = method(name, reach=reach)
        at = m.neighbours(teacher, batch)
        sizes.append([float(d.detach().abs().mean()) for d in apart(m, Ends(exact), at, batch.x0)])
    for long, short in zip(*sizes, strict=True):
        assert long / short == pytest.approx(4, rel=0.2)
        assert short < 1e-3


def test_the_loss_by_hand() -> None:
    """Huber of both directions, the line between noise and sample, and softplus of a logit."""
    teacher, exact, batch = scene("flow", "gaussian")
    student = Ends(exact, 0.8)
    m = method("flow", line=0.3, up=0.5)
    nets = Nets({"student": student})
    at = m.neighbours(teacher, batch)
    assert batch.x0 is not None
    below, above = (difference.detach() for difference in apart(m, student, at, batch.x0))
    d = [float(((y**2 + 1e-4).sqrt() - 0.01).mean()) for y in (below, above)]
    t = at.t[:, None]
    with torch.no_grad():
        sample = student(batch.z, torch.ones(80, dtype=F64))
        again = student((1 - t) * sample + t * batch.z, at.t)
    line = float(((again - sample) ** 2).mean())
    found = m.student_loss(nets, teacher, batch)
    assert found.total is not None
    assert float(found.total.detach()) == pytest.approx(d[0] + 0.5 * d[1] + 0.3 * line, rel=1e-6)
    (slope,) = torch.autograd.grad(found.total, student.size)
    alone = replace(m, line=0.0).student_loss(nets, teacher, batch).total
    assert alone is not None
    (without,) = torch.autograd.grad(alone, student.size)
    by_hand = (2 * (again - sample) * again / student.size.detach()).mean()  # not through sample
    assert float(slope - without) == pytest.approx(0.3 * float(by_hand), rel=1e-6)


def test_low_times_have_the_datum_as_target() -> None:
    teacher, exact, batch = scene("flow", "gaussian")
    assert batch.x0 is not None
    at = method("flow").neighbours(teacher, batch)
    nets = Nets({"student": Ends(exact)})
    plain, _ = method("flow").targets(nets, at, batch.x0)
    found, _ = method("flow", truncate=0.5).targets(nets, at, batch.x0)
    near = at.low < 0.5
    assert 0.3 < float(near.double().mean()) < 0.9
    assert torch.equal(found[near], batch.x0[near])
    assert torch.equal(found[~near], plain[~near])
    assert float((found - plain)[near].abs().mean()) > 0.1


def test_the_discriminator_judges_the_sample_of_one_call() -> None:
    """Its gradient reaches the student through G(z), and it is updated first."""
    model = Model(MLP(16, 1), (2,), path=Flow(), predicts="velocity")
    net: Any = stirred(model.build(1), 1)
    m = SCFlow(FewStep(1.0, 2), line=0.0)
    nets = m.init(net, net)
    assert [turn.net for turn in m.turns(0)] == ["discriminator", "student"]
    draws = Draws.range(0, 12)
    x0 = draws.normal("x", (2,))
    batch = Batch(draws.normal("z", (2,)), None, x0, draws)
    judged = m.student_loss(nets, net, batch)
    plain = replace(m, gan=0.0).student_loss(nets, net, batch)
    sample = nets["student"](batch.z, torch.ones(12))
    t = torch.full((12,), 1e-3)
    logits = m.discriminator.logits(nets, net, sample, t, None)
    expected = torch.nn.functional.softplus(-logits).mean()
    assert judged.total is not None
    assert plain.total is not None
    torch.testing.assert_close(judged.logs["gan_loss"], expected)
    torch.testing.assert_close(judged.total - plain.total, 0.1 * expected, rtol=1e-4, atol=1e-6)
    unpaid = replace(m, discriminator=replace(m.discriminator, penalty=GradientPenalty()))
    told = unpaid.turns(0)[0].loss(nets, net, batch).total
    data = m.discriminator.logits(nets, net, x0, t, None)
    both = torch.nn.functional.softplus(logits) + torch.nn.functional.softplus(-data)
    assert told is not None
    torch.testing.assert_close(told, both.mean() / 2)
    assert set(replace(m, gan=0.0).init(net, net)) == {"student", "target"}


def test_each_side_has_the_target_of_its_own_point() -> None:
    """Of a student that is no consistency function, whose two targets differ."""
    net: Any = stirred(Model(MLP(16, 1), (2,), path=Flow(), predicts="velocity").build(1), 1)
    m, nets = method("flow", decay=0.5), Nets({"student": nn.Identity(), "target": net})
    points = [Draws.range(0, 9).normal(name, (2,)) for name in ("below", "above")]
    times = [torch.full((9,), time) for time in (0.3, 0.5, 0.7, 1e-3)]
    at = Neighbours(points[0], points[0], points[1], times[1], times[0], *times[2:], None)
    found = m.targets(nets, at, points[0])
    for target, x, t in zip(found, points, (times[0], times[2]), strict=True):
        torch.testing.assert_close(target, jump(net, x, t, times[3], None))


def test_guidance_is_the_teachers() -> None:
    net: Any = stirred(Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2), 2).double()
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    at = method("flow", kappa=2.5).neighbours(net, batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    f = free + 2.5 * (told - free)
    torch.testing.assert_close(at.below, Flow().ddim(at.xt, f, at.t, at.low))
    torch.testing.assert_close(at.above, Flow().ddim(at.xt, f, at.t, at.high))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": Jumps(2.5)}, "is a FewStep"),
        ({"reach": 0.0}, "reach in"),
        ({"truncate": 1.5}, "truncate in"),
        ({"c": 0.0}, "c > 0"),
        ({"up": -1.0}, "are 0 or more"),
        ({"decay": 1.0}, "below 1; got 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCFlow(**settings)
