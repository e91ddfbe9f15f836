"""CTM: its fixed point is the product of the solver's steps, between any two times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.methods.ctm import CTM
from fewstep.nets.mlp import MLP
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.maps import KnownMap, LadderMap, SolvedMap, scene

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 20.0),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}


def loss_of(m: CTM, net: KnownMap, teacher: Any, batch: Batch, average: Any = None) -> Loss:
    """With four solver steps; the average is the map itself unless another is given."""
    return m.student_loss(4, Nets({"student": net, "target": average or net}), teacher, batch)


def slope(loss: Loss, net: KnownMap) -> float:
    assert loss.total is not None
    (gradient,) = torch.autograd.grad(loss.total, net.shift)
    return float(gradient.abs().max())


def map_of_the_flow(teacher: Any) -> list[KnownMap]:
    """None on timesteps, where finding times of noise levels takes long."""
    return [] if isinstance(teacher.path, VP) else [SolvedMap(teacher, 8)]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("compare", ["data", "state"])
def test_the_solvers_steps_are_the_fixed_point(name: str, kind: str, compare: Any) -> None:
    """Loss below 1e-20, gradient below 1e-9; not another solver's steps, nor the exact flow."""
    path, start = STARTS[name]
    m = CTM(Jumps(start), Ladder(9), compare=compare, denoising=0.0)
    teacher, batch = scene(path, kind, 40)
    times = m.ladder.times(path, start)
    net = LadderMap(teacher, times, 2)
    found = loss_of(m, net, teacher, batch)
    assert found.total is not None
    assert found.total.item() < 1e-20
    assert slope(found, net) < 1e-9
    for wrong in (LadderMap(teacher, times, 1), *map_of_the_flow(teacher)):
        other = loss_of(m, wrong, teacher, batch)
        assert other.total is not None
        assert other.total.item() > 1e-8
        assert slope(other, wrong) > 1e-6


def test_the_exact_flow_is_the_limit_of_fine_ladders() -> None:
    """The error of Heun's method falls with the square of the steps, that of the loss as its
    square: 16 times for twice as many.
    """
    teacher, batch = scene(Flow(), "mixture", 200)
    errors = []
    for steps in (16, 32):
        m = CTM(Jumps(1.0), Ladder(steps), denoising=0.0)
        nets = Nets({"student": SolvedMap(teacher, 40), "target": SolvedMap(teacher, 40)})
        found = m.student_loss(steps // 4, nets, teacher, batch)
        errors.append(float(found.logs["error"]))
    assert errors[1] < errors[0] / 8
    assert errors[1] < 1e-5


def test_times_and_solver_steps() -> None:
    """s <= u < t on the ladder, `count` steps apart, all of them; the number is of the step."""
    m = CTM(ladder=Ladder(6))
    _, batch = scene(VE(), count=400)
    ladder = m.ladder.times(VE(), 2.5)
    at = m.course(2, VE(), batch)
    n, u, s = (
        torch.tensor([ladder.index(float(v)) for v in times])
        for times in (at.times[:, 0], at.times[:, 2], at.s)
    )
    assert torch.equal(u, n - 2)
    assert bool((s <= u).all())
    assert set(n.tolist()) == set(range(2, 7))
    assert set(s[n == 6].tolist()) == set(range(5))
    assert float(at.end.max()) == VE().t_min
    assert m.course(50, VE(), batch).times.shape == (400, 7)
    counts = [turn.loss.args[0] for k in range(60) for turn in m.turns(k)]  # type: ignore[attr-defined]
    assert set(counts) == {1, 2, 3, 4}


def test_both_sides_are_carried_to_the_data_by_the_average() -> None:
    """By hand: G^-(G(x_t, t, s), s, 0) with a gradient through G^- but not of it."""
    m = CTM(ladder=Ladder(6), denoising=0.0)
    teacher, batch = scene(VE())
    times = m.ladder.times(VE(), 2.5)
    student, average = LadderMap(teacher, times, 1), LadderMap(teacher, times, 2)
    average.shift.requires_grad_(False).add_(0.3)
    nets = Nets({"student": student, "target": average})
    at = m.course(3, VE(), batch)
    made, goal = m.sides(nets, teacher, at, batch)

    def carried(net: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return VE().ddim(x, net(x, t, s=s), t, s)

    t, u = at.times[:, 0], at.times[:, 3]
    xu = average.carry(at.xt, t, u)
    expected = carried(average, carried(average, xu, u, at.s), at.s, at.end)
    torch.testing.assert_close(goal, expected)
    expected = carried(average, carried(student, at.xt, t, at.s), at.s, at.end)
    torch.testing.assert_close(made, expected)
    assert not goal.requires_grad
    found = loss_of(m, student, teacher, batch, average)
    assert slope(found, student) > 1e-3
    assert average.shift.grad is None


def test_score_matching_teaches_the_denoiser() -> None:
    """On average over the data's law its gradient is zero at the denoiser, and not beside it."""
    teacher, batch = scene(VE(), count=40_000)
    m = CTM(denoising=1.0, times=LogNormal(0.0, 0.3))
    net = LadderMap(teacher, [0.002, 2.5])
    (gradient,) = torch.autograd.grad(m.score_matching(net, batch), net.shift)
    assert float(gradient.abs().max()) < 0.03
    net.shift.data.fill_(0.1)
    (gradient,) = torch.autograd.grad(m.score_matching(net, batch), net.shift)
    assert float(gradient.abs().min()) > 0.2
    net.shift.data.zero_()
    parts = [loss_of(replace(m, denoising=c), net, teacher, batch).total for c in (0.0, 1.0, 3.0)]
    apart = [float((part - parts[0]).detach()) for part in parts]  # type: ignore[operator]
    assert apart[2] == pytest.approx(3 * apart[1])
    assert apart[1] == pytest.approx(float(m.score_matching(net, batch)))


def test_the_target_follows_and_the_student_starts_as_the_teacher() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    m = CTM(decay=0.75)
    nets = m.init(net, net)
    assert set(nets) == {"student", "target"}
    student: Any = nets["student"]
    draws = Draws.range(0, 4)
    x, t, cond = draws.normal("x", (2,)), draws.uniform("t"), draws.integers("label", 3)
    assert torch.equal(student(x, t, cond, s=t / 2), net(x, t, cond))
    assert m.result(model) == replace(model, inputs=("s",))
    for p in student.parameters():
        p.data += 1
    m.after_step(Step(nets, net, 0, 0, 0, {}))
    pairs = zip(nets["target"].parameters(), student.parameters(), strict=True)
    assert all(torch.allclose(a, b - 0.75, atol=1e-6) for a, b in pairs)


def test_training_reaches_the_solvers_steps() -> None:
    """Through the loop: a shift that is far off comes back."""
    teacher, batch = scene(VE())
    m = CTM(ladder=Ladder(4), denoising=0.0, decay=0.5)
    object.__setattr__(m, "init", lambda teacher, net: Nets({"student": net, "target": again}))
    start, again = (LadderMap(teacher, m.ladder.times(VE(), 2.5), 2) for _ in range(2))
    start.shift.data.fill_(0.5)
    again.shift.data.fill_(0.5)
    settings: Any = {"batch": 20, "optim": Optim(8e-2, (0.9, 0.99), decay="cosine")}

    def source(draws: Draws) -> Batch:
        return Batch(batch.x0[:20], None, batch.x0[:20], draws)  # type: ignore[index]

    *_, last = train(m, teacher, start, source, steps=50, **settings)
    found: Any = last.state.nets["student"]
    assert float(found.shift.abs().max()) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"most": 0}, "most >= 1"),
        ({"order": 3}, "order is 1 or 2"),
        ({"denoising": -1.0}, "denoising >= 0"),
        ({"compare": "noise"}, "'data' or 'state'"),
        ({"decay": 0.0}, "decay is above"),
        ({"decay": 1.0}, "below 1; got 1"),
        ({"kappa": 2.0}, "say denoising=0.0"),
        ({"sampler": FewStep(2.5)}, "Jumps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTM(**settings)
