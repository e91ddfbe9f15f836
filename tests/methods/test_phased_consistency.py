"""Phased consistency: in each phase the fixed point is the product of the teacher's steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, WithInput
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import times_of_calls
from fewstep.distillation.method import Nets
from fewstep.methods.phased_consistency import PhasedConsistency
from fewstep.nets.mlp import MLP
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.maps import Ends, KnownMap, LadderMap, SolvedMap, scene
from tests.networks import stirred

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 20.0),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}


def method(name: str, told: bool, **settings: Any) -> PhasedConsistency:
    """Three phases of four steps."""
    _, start = STARTS[name]
    rho = 3.0 if name == "ve" else 1.0
    sampler = Jumps(start, 3, rho) if told else FewStep(start, 3, "ddim", rho)
    return PhasedConsistency(sampler, steps=4, **settings)


def below(edges: list[float], above: int = 0) -> Ends:
    """The end of the phase of t, or another phase's."""
    ends = torch.tensor(edges, dtype=torch.float64)
    return lambda t: ends[(torch.bucketize(t, ends) - 1 - above).clamp(min=0)]


def loss_of(
    m: PhasedConsistency, net: KnownMap, teacher: Any, batch: Batch
) -> tuple[float, float]:
    """Loss, and the largest derivative by the map's shift."""
    total = m.student_loss(3, Nets({"student": net}), teacher, batch).total
    assert total is not None
    (gradient,) = torch.autograd.grad(total, net.shift)
    return total.item(), float(gradient.abs().max())


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("told", [False, True])
def test_the_teachers_steps_are_the_fixed_point(name: str, kind: str, told: bool) -> None:
    """Loss below 1e-20, gradient below 1e-9; not phases that end one edge lower, nor the flow."""
    path, _ = STARTS[name]
    m = method(name, told)
    teacher, batch = scene(path, kind, 40)
    fine, edges = (times_of_calls(m.sampler_of(n), path) for n in (12, 3))
    assert len(fine) == 13
    assert set(edges) <= set(fine)
    value, slope = loss_of(m, LadderMap(teacher, fine, 1, below(edges)), teacher, batch)
    assert value < 1e-18
    assert slope < 1e-7
    wrongs: list[KnownMap] = [LadderMap(teacher, fine, 2, below(edges))]
    if not told:
        wrongs.append(LadderMap(teacher, fine, 1, below(edges, 1)))
    if name == "flow":
        wrongs.append(SolvedMap(teacher, 8, below(edges)))
    for wrong in wrongs:
        value, slope = loss_of(m, wrong, teacher, batch)
        assert value > 1e-7
        assert slope > 1e-5


def test_the_student_samples_what_the_solver_does() -> None:
    """Calls of the fixed point, one a phase, end where all steps of the teacher do."""
    m = method("flow", told=False)
    teacher, batch = scene(Flow(), "mixture", 40)
    fine, edges = (times_of_calls(m.sampler_of(n), Flow()) for n in (12, 3))
    net: Any = LadderMap(teacher, fine, 1, below(edges))
    whole = m.sampler_of(12)
    assert isinstance(whole, FewStep)
    torch.testing.assert_close(m.sampler(net, batch.z), whole(teacher, batch.z), atol=5e-3, rtol=0)
    assert (m.sampler(teacher, batch.z) - whole(teacher, batch.z)).abs().max() > 0.05


def test_phases_of_timesteps() -> None:
    """They end where the sampler calls, and an edge belongs to the phase below."""
    m = PhasedConsistency(FewStep(999.0, 4, "ddim"))
    _, batch = scene(VP(), count=20_000)
    at = m.pair(4, VP(), batch)
    assert set(at.s.tolist()) == {0.0, 249.0, 499.0, 749.0}
    phase = ((at.t - 1) / 250).floor()
    assert torch.equal(at.s, (250 * phase - 1).clamp(min=0))
    assert bool(((at.s <= at.u) & (at.u < at.t)).all())
    assert len(set(at.t.tolist())) == 48
    told = PhasedConsistency(Jumps(999.0, 4)).pair(4, VP(), batch)
    assert bool(((at.s <= told.s) & (told.s <= told.u)).all())
    top = told.s[told.t == 999]
    ends = sorted(set(told.t.tolist()) & {float(t) for t in range(749, 999)})
    assert sorted(set(top.tolist())) == ends
    counts = torch.tensor([float((top == end).sum()) for end in ends])
    expected = len(top) / len(ends)  # chi-squared: as likely one as another
    assert float(((counts - expected) ** 2 / expected).sum()) < len(ends) + 5 * len(ends) ** 0.5


def test_hubers_loss_and_the_guided_teacher_by_hand() -> None:
    m = method("flow", told=False, c=0.1, kappa=2.5)
    net = Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2).double()
    stirred(net, 3)
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), torch.float64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    at = m.pair(3, Flow(), batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    xu = Flow().ddim(at.xt, free + 2.5 * (told - free), at.t, at.u)
    made = Flow().ddim(at.xt, told, at.t, at.s)
    goal = Flow().ddim(xu, net(xu, at.u, batch.cond), at.u, at.s)
    by_hand = (((made - goal) ** 2 + 0.01).sqrt() - 0.1).mean()
    found = m.student_loss(3, Nets({"student": net}), net, batch)
    torch.testing.assert_close(found.total, by_hand)
    torch.testing.assert_close(found.logs["error"], ((made - goal) ** 2).mean())


def test_fewer_phases_stage_by_stage() -> None:
    """Through the loop: stages, the optimiser, and the calls of the product."""
    m = PhasedConsistency(phases=(16, 8, 4), stage_steps=2, decay=0.5)
    teacher, _ = scene(VE())

    def source(draws: Draws) -> Batch:
        x0 = draws.normal("x0", (2,))
        return Batch(x0, None, x0, draws)

    settings: Any = {"batch": 4, "optim": Optim(1e-2), "ema": EMA(0.0)}
    calls, stages, restarts = [], [], []
    net = Model(MLP(16, 1), (2,)).build()
    for record in train(m, teacher.float(), net, source, steps=7, **settings):
        nets = record.state.nets
        calls.append(m.product(nets, record.state.average, None).sampler.calls)
        stages.append(int(nets["stage"].number))  # type: ignore[arg-type]
        restarts.append(record.restarted == ("student",))
    assert stages == [0, 0, 1, 1, 2, 2, 2]
    assert calls == [16, 16, 8, 8, 4, 4, 4]
    assert restarts == [False, True, False, True, False, False, False]
    assert [turn.loss.args for k in (0, 3, 9) for turn in m.turns(k)] == [(16,), (8,), (4,)]  # type: ignore[attr-defined]
    assert set(nets) == {"student", "target", "stage"}
    assert set(PhasedConsistency(decay=0.0).init(teacher, net)) == {"student"}


def test_a_student_of_jumps_is_told_where_they_end() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    assert PhasedConsistency().result(model) == model
    m = PhasedConsistency(Jumps(2.5, 4))
    assert m.result(model) == replace(model, inputs=("s",))
    net = model.build(1)
    student: Any = m.init(net, net)["student"]
    x, t = torch.ones(2, 2), torch.tensor([1.0, 2.0])
    assert torch.equal(student(x, t, None, s=t / 2), net(x, t, None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "1 or more"),
        ({"stage_steps": 0}, "1 or more"),
        ({"c": 0.0}, "c > 0"),
        ({"order": 3}, "order is 1 or 2"),
        ({"decay": 1.0}, "below 1"),
        ({"phases": (8, 2)}, "fall to the 4 calls"),
        ({"phases": (2, 4)}, r"such as \(8, 4\)"),
        ({"sampler": Heun()}, "is a FewStep"),
        ({"sampler": FewStep(2.5, 4)}, "is a FewStep"),
        ({"sampler": WithInput(FewStep(2.5, 4, "ddim"), "w", 1.0)}, "is a FewStep"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhasedConsistency(**settings)
