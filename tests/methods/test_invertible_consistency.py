"""iCD: the solver's own steps have no loss in either direction, the exact flow none in return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps, WithInput
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder, solve
from fewstep.distillation.method import Nets, Step
from fewstep.methods.invertible_consistency import InvertibleConsistency, edge_beyond
from fewstep.nets.mlp import MLP
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 0.95),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)
DRAWS = Draws.range(0, 60)
LABELS = DRAWS.integers("label", 3)
BATCH = Batch(DRAWS.normal("z", (2,), F64), LABELS, DRAWS.normal("x0", (2,), F64), DRAWS)


def method(start: float, **settings: Any) -> InvertibleConsistency:
    return InvertibleConsistency(Jumps(start, 2), Ladder(6), **settings)


class Stepping(nn.Module):
    """The flow map that the teacher's solver makes of its steps on the method's times.

    past: how many steps too far it goes.
    """

    def __init__(self, m: InvertibleConsistency, teacher: Any, past: int = 0) -> None:
        super().__init__()
        self.m, self.teacher, self.path, self.past = m, teacher, teacher.path, past
        self.seen: list[float] = []

    def forward(
        self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor, w: Any = None
    ) -> Tensor:
        times = xt.new_tensor(self.m.edges_and_times(self.path)[1])
        kappa = torch.ones(len(xt), dtype=F64) if w is None else 1 + w.expand(len(xt))
        self.seen.extend((kappa - 1).tolist())
        out = torch.zeros_like(xt)
        for now, then in set(zip(t.tolist(), s.tolist(), strict=True)):
            rows = (t == now) & (s == then)
            i, j = (int((times - u).abs().argmin()) for u in (now, then))
            if i == j:
                continue
            step = 1 if j > i else -1
            end = min(max(j + step * self.past, 0), len(times) - 1)
            x, here = xt[rows], None if cond is None else cond[rows]
            for k in range(i, end, step):
                scale = 1.0 if here is None else kappa[rows]
                x = solve(self.teacher, x, times[k], times[k + step], here, scale, self.m.order)
            a, sa, b, sb = (
                c(u) for u in times[[i, j]] for c in (self.path.alpha, self.path.sigma)
            )
            out[rows] = (x - sb / sa * xt[rows]) / (b - sb / sa * a)
        return out


def logs(m: InvertibleConsistency, student: Any, teacher: Any, **change: Any) -> dict[str, float]:
    found = m.student_loss(Nets({"student": student}), teacher, BATCH._replace(**change))
    return {name: float(value) for name, value in found.logs.items()}


@each_path
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_solvers_steps_have_no_loss(name: str, kind: str, order: Any) -> None:
    """Down and up, on any teacher, to 1e-8; a student that jumps one step too far has."""
    path, start = STARTS[name]
    m, teacher = method(start, order=order), TEACHERS[kind](path)
    found = logs(m, Stepping(m, teacher), teacher, cond=None)
    assert max(found["down"], found["up"]) < 1e-8
    other = logs(m, Stepping(m, teacher, past=1), teacher, cond=None)
    assert other["down"] > 1e-3
    assert other["up"] > 1e-6  # most of the upper segment ends where it should


@each_path
def test_the_exact_flow_returns(name: str) -> None:
    """Both ways between the edges, to 1e-9; the solver's steps do not."""
    path, start = STARTS[name]
    teacher: Any = TEACHERS["gaussian"](path)
    m = method(start)
    exact = logs(m, GaussianFlowMap(teacher), teacher, cond=None)
    assert max(exact["there_and_back"], exact["back_and_there"]) < 1e-9
    solver = logs(m, Stepping(m, teacher), teacher, cond=None)
    assert min(solver["there_and_back"], solver["back_and_there"]) > 1e-3
    better = method(start, order=2)
    second = logs(better, GaussianFlowMap(teacher), teacher, cond=None)
    assert max(second["down"], second["up"]) < 0.6 * max(exact["down"], exact["up"])


def test_the_student_is_told_w_on_the_way_down_alone() -> None:
    """No loss for the guided solver's steps at every w, down; 0 up and in the return trips."""
    path, start = STARTS["flow"]
    m, teacher = method(start, scales=(1.0, 3.0)), TEACHERS["mixture"](path)
    student = Stepping(m, teacher)
    found = logs(m, student, teacher)
    assert max(found["down"], found["up"]) < 1e-8
    scales = torch.tensor(student.seen).reshape(-1, 60)
    want = 2 * DRAWS.uniform("kappa").double()
    torch.testing.assert_close(scales[0].double(), want)
    torch.testing.assert_close(scales[1].double(), want)
    assert float(scales[2:].abs().max()) == 0
    assert len(scales) == 8

    class Deaf(Stepping):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, **named: Any) -> Tensor:
            return super().forward(xt, t, cond, s=named["s"])

    assert logs(m, Deaf(m, teacher), teacher)["down"] > 1e-3
    plain = guided(teacher, BATCH.z, torch.full((60,), 0.5), LABELS, [1.0]).predictions[0]
    assert plain.shape == BATCH.z.shape


def test_the_targets_have_no_gradient() -> None:
    """That of the jumps from u, and of the first leg of a return trip: by differences."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = Flow()
            self.c = nn.Parameter(torch.tensor(0.4, dtype=F64))
            self.frozen = 0.4

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
            return (self.c if torch.is_grad_enabled() else self.frozen) * xt

    m, teacher = method(0.95), TEACHERS["gaussian"](Flow())
    student = Scaled()

    def total() -> Tensor:
        out = m.student_loss(Nets({"student": student}), teacher, BATCH._replace(cond=None)).total
        assert out is not None
        return out

    (slope,) = torch.autograd.grad(total(), student.c)
    ends = []
    for h in (1e-5, -1e-5):
        student.c.data.fill_(0.4 + h)
        ends.append(float(total().detach()))
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    student.c.data.fill_(0.7)  # what is made without a gradient is made with 0.4
    x = BATCH.z
    t, s = (torch.full((len(x),), time, dtype=F64) for time in (0.8, 0.2))
    there = Flow().ddim(x, 0.4 * x, t, s)
    back = Flow().ddim(there, 0.7 * there, s, t)
    found = m.return_trip(student, x, t, s, BATCH)
    by_hand = (((back - x) ** 2 + m.c**2).sqrt() - m.c).mean()
    torch.testing.assert_close(found, by_hand)


def test_the_target_is_an_average_of_the_student() -> None:
    """It makes X^- in both directions, and follows by 1 - decay in a step."""
    net: Any = Model(MLP(8, 1), (2,), 3).build(1)
    m = InvertibleConsistency(Jumps(2.5, 2, 3.0), Ladder(6), preserve=0.0, decay=0.75)
    teacher = TEACHERS["mixture"](VE())
    nets = m.init(net, net)
    assert set(nets) == {"student", "target"}
    assert set(replace(m, decay=0.0).init(net, net)) == {"student"}
    for p in nets["student"].parameters():
        p.data += 1
    m.after_step(Step(nets, net, 0, 0, 0, {}))
    rows = zip(nets["target"].parameters(), nets["student"].parameters(), strict=True)
    assert all(torch.allclose(a, b - 0.75, atol=1e-6) for a, b in rows)

    right, wrong = Stepping(m, teacher), Stepping(m, teacher, past=1)
    given = BATCH._replace(cond=None)
    for target, least, most in ((right, -1e-9, 1e-8), (wrong, 1e-6, 10.0)):
        found = m.student_loss(Nets({"student": right, "target": target}), teacher, given).logs
        assert all(least <= float(found[name]) < most for name in ("down", "up"))


def test_edges_by_hand() -> None:
    edges, u = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    assert edge_beyond(edges, u, True).tolist() == [0.0, 0.0, 1.0, 1.0, 2.0]
    assert edge_beyond(edges, u, False).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0]


@each_path
def test_the_edges_are_among_the_times(name: str) -> None:
    path, start = STARTS[name]
    m = InvertibleConsistency(Jumps(start, 4, 2.0))
    edges, times = m.edges_and_times(path)
    assert edges == [path.t_min, *reversed(Jumps(start, 4, 2.0).ladder(path))]
    assert set(edges) <= set(times)
    assert times == sorted(set(times))
    assert 25 <= len(times) <= 29


def test_the_student_and_what_is_shipped() -> None:
    model = Model(MLP(8, 1), (2,), 3)
    net: Any = model.build()
    plain, told = InvertibleConsistency(), InvertibleConsistency(kappa=2.0, scales=(1.0, 3.0))
    assert plain.init(net, net)["student"].input_names == ("s",)
    nets = told.init(net, net)
    assert nets["student"].input_names == ("s", "w") == told.result(model).inputs
    assert told.product(nets, net, None).sampler == WithInput(told.sampler, "w", 1.0)
    assert plain.product(nets, net, None).sampler == plain.sampler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": FewStep(2.5)}, "sampler is a Jumps"),
        ({"scales": (3.0, 1.0)}, "the least and the largest kappa"),
        ({"kappa": 4.0, "scales": (1.0, 3.0)}, "the least and the largest kappa"),
        ({"preserve": -1.0}, "preserve >= 0 and c > 0"),
        ({"c": 0.0}, "preserve >= 0 and c > 0"),
        ({"order": 3}, "order is 1 or 2"),
        ({"decay": 1.0}, "below 1; got 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertibleConsistency(**settings)
