"""TDD: told its ends, the fixed point is the product of the teacher's steps to the targets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import times_of_calls
from fewstep.distillation.method import Nets, Step
from fewstep.methods.tdd import TDD
from fewstep.nets.mlp import MLP
from tests.maps import KnownMap, LadderMap, Point, SolvedMap, scene
from tests.networks import stirred

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 20.0),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}


def method(name: str, told: bool = True, **settings: Any) -> TDD:
    """Targets of two and three calls on a ladder of twelve steps, which has them all."""
    start, rho = STARTS[name][1], 3.0 if name == "ve" else 1.0
    sampler = Jumps(start, 3, rho) if told else FewStep(start, 3, "ddim", rho)
    return TDD(sampler, (2, 3), 12, **{"rho": 0.0, "window": 1.0, **settings})


def loss_of(m: TDD, net: KnownMap, teacher: Any, batch: Batch) -> tuple[float, float]:
    """Loss, and the largest derivative by the map's shift."""
    total = m.student_loss(Nets({"student": net}), teacher, batch).total
    assert total is not None
    (gradient,) = torch.autograd.grad(total, net.shift)
    return total.item(), float(gradient.abs().max())


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_the_teachers_steps_are_the_fixed_point(name: str, kind: str) -> None:
    """Loss below 1e-18, gradient below 1e-7; not those of another solver."""
    path, m = STARTS[name][0], method(name)
    teacher, batch = scene(path, kind, 40)
    assert isinstance(m.sampler, Jumps)
    fine = times_of_calls(replace(m.sampler, steps=12), path)
    value, slope = loss_of(m, LadderMap(teacher, fine), teacher, batch)
    assert value < 1e-18
    assert slope < 1e-7
    value, slope = loss_of(m, LadderMap(teacher, fine, 2), teacher, batch)
    assert value > 1e-7
    assert slope > 1e-5


def test_the_exact_flow_is_the_limit_of_fine_ladders() -> None:
    """At ends a little below the targets too; the error of DDIM's step falls as its square."""
    teacher, batch = scene(Flow(), "mixture", 200)
    errors = []
    for steps in (24, 48):
        m = replace(method("flow"), steps=steps, rho=0.3)
        nets = Nets({"student": SolvedMap(teacher, 30)})
        errors.append(float(m.student_loss(nets, teacher, batch).logs["error"]))
    assert errors[1] < errors[0] / 8
    assert errors[1] < 1e-4


@pytest.mark.parametrize("name", STARTS)
def test_untold_a_straight_flow_is_the_fixed_point(name: str) -> None:
    """One prediction serves all ends there; a curved flow's denoiser has a loss."""
    path, m = STARTS[name][0], method(name, told=False)
    teacher, batch = scene(path)
    net: Any = Point(teacher)
    value, slope = loss_of(m, net, net, batch)
    assert value < 1e-18
    assert slope < 1e-7
    total = m.student_loss(Nets({"student": teacher}), teacher, batch).total
    assert total is not None
    assert total.item() > 1e-4


def test_targets_of_timesteps() -> None:
    """The times of four to eight calls, within 26 % below the largest that is not above u."""
    m = TDD(FewStep(999.0, 4, "ddim"), steps=48, rho=0.0)
    _, batch = scene(VP(), count=4000)
    at = m.pair(VP(), batch)
    every = {t for k in range(4, 9) for t in times_of_calls(FewStep(999.0, k, "ddim"), VP())} - {
        999.0
    }
    assert set(at.s.tolist()) == every
    assert set(at.t.tolist()) == set(times_of_calls(FewStep(999.0, 48, "ddim"), VP())[1:])
    assert bool(((at.s <= at.u) & (at.u < at.t)).all())
    top = at.s[at.t == 999]
    below = {t for t in every if t <= 978}
    assert set(top.tolist()) == {t for t in below if t >= max(below) - 260.5}
    lower = replace(m, rho=0.3).pair(VP(), batch)
    assert torch.equal(lower.s, lower.s.floor())
    kept = lower.s[at.s > 0] / at.s[at.s > 0]
    assert 0.69 < float(kept.min()) < 0.72
    assert 0.98 < float(kept.max()) <= 1


@pytest.mark.parametrize(
    ("calls", "counts", "reach"),
    [(1, (1, 1), 1.0), (2, (2, 4), 0.52), (4, (4, 8), 0.26), (8, (8, 16), 0.13)],
)
def test_targets_are_those_of_the_samplers_calls(
    calls: int, counts: tuple[int, int], reach: float
) -> None:
    """Published for four; every call that is made has its own end among its targets."""
    m = TDD(FewStep(80.0, calls, "ddim", 3.0), steps=48, rho=0.0)
    assert m.counts == counts
    assert m.reach == pytest.approx(reach)
    assert replace(m, calls=(4, 8), window=0.2).counts == (4, 8)
    assert replace(m, calls=(4, 8), window=0.2).reach == 0.2
    _, batch = scene(VE(), count=4000)
    at, made = m.pair(VE(), batch), times_of_calls(FewStep(80.0, calls, "ddim", 3.0), VE())
    for end, start in pairwise(made):
        ends = at.s[torch.isclose(at.t, at.t.new_full((), start))]
        assert bool(torch.isclose(ends, at.s.new_full((), end)).any())
    assert calls > 1 or set(at.s.tolist()) == {VE().t_min}


def test_without_conditions_by_hand() -> None:
    """Dropped samples see none in the teacher, the student and the target; others are guided."""
    m = replace(method("flow", told=False), kappa=2.5, drop=0.5, c=0.1)
    net = Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2).double()
    stirred(net, 3)
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), torch.float64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    told = m.told(batch)
    assert told is not None
    assert 8 < float(told.sum()) < 22
    at, keep = m.pair(Flow(), batch), told[:, None] > 0

    def seen(x: torch.Tensor, t: torch.Tensor, kappa: float) -> torch.Tensor:
        free, cond = net(x, t, None), net(x, t, batch.cond)
        return torch.where(keep, free + kappa * (cond - free), free)

    xu = Flow().ddim(at.xt, seen(at.xt, at.t, 2.5), at.t, at.u)
    made = Flow().ddim(at.xt, seen(at.xt, at.t, 1.0), at.t, at.s)
    goal = Flow().ddim(xu, seen(xu, at.u, 1.0), at.u, at.s)
    found = m.student_loss(Nets({"student": net}), net, batch).total
    torch.testing.assert_close(found, (((made - goal) ** 2 + 0.01).sqrt() - 0.1).mean())
    assert replace(m, drop=0.0).told(batch) is None


def test_the_target_follows_and_a_student_of_jumps_is_told() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    m = TDD(Jumps(2.5, 4), decay=0.75)
    assert m.result(model) == replace(model, inputs=("s",))
    assert TDD().result(model) == model
    assert set(TDD(decay=0.0).init(net, net)) == {"student"}
    nets = m.init(net, net)
    for p in nets["student"].parameters():
        p.data += 1
    m.after_step(Step(nets, net, 0, 0, 0, {}))
    rows = zip(nets["target"].parameters(), nets["student"].parameters(), strict=True)
    assert all(torch.allclose(a, b - 0.75, atol=1e-6) for a, b in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"c": 0.0}, "c > 0"),
        ({"order": 3}, "order is 1 or 2"),
        ({"decay": 1.0}, "below 1"),
        ({"calls": (8, 4)}, "in order"),
        ({"window": 2.0}, "are shares"),
        ({"rho": 1.0}, "are shares"),
        ({"drop": -0.1}, "are shares"),
        ({"sampler": Heun()}, "is a FewStep"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TDD(**settings)
