"""GAS: every number in its place, its fixed point, its adversary, and its gain on new noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.config import parse
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Nets
from fewstep.distillation.pairs import Pairs, make_pairs
from fewstep.losses.distance import SquaredL2
from fewstep.methods.gas import GAS, SolverNumbers
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.instances import TEACHERS
from tests.methods.test_battery import network

F64 = torch.float64
Z = Draws.range(0, 24).normal("z", (2,), F64)
PATHS: tuple[NoisePath, ...] = (VE(), Flow(), TrigFlow(), VP())
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def source(draws: Draws) -> Batch:
    return Batch(draws.normal("z", (2,), F64), None, None, draws)


def started(method: GAS, teacher: Any) -> tuple[Nets, Any]:
    nets = method.init(teacher, network(1).double())
    return nets, nets["student"]


def shipped(method: GAS, teacher: Any, nets: Nets) -> LinearSolver:
    sampler = method.product(nets, nets["student"], teacher).sampler
    assert isinstance(sampler, LinearSolver)
    assert parse(repr(sampler)) == sampler
    return sampler


@each_path
@pytest.mark.parametrize("order", [1, 3])
def test_it_starts_as_the_solver_it_is_given(path: NoisePath, order: int) -> None:
    teacher: Any = TEACHERS["mixture"](path)
    start = LinearSolver(5, order=order)
    method = GAS(start, gan=0)
    nets, _ = started(method, teacher)
    sampler = shipped(method, teacher, nets)
    assert sampler.times == pytest.approx(start.ladder(path), rel=1e-6)
    torch.testing.assert_close(sampler(teacher, Z), start(teacher, Z), rtol=1e-5, atol=1e-5)
    assert list(nets) == ["student"]


def test_every_number_by_hand() -> None:
    """Sticks, what the network is told, corrections of states by their size, of predictions."""
    path = VE()
    solver = SolverNumbers(LinearSolver(times=(8.0, 2.0, 0.5), order=1), path, F64)
    base = LinearSolver(times=(8.0, 2.0, 0.5)).numbers(path)
    with torch.no_grad():
        solver.xi[1] = 0.3
        solver.da[2, 0], solver.dc[1, 0], solver.da[1, 1] = 0.7, -0.2, 0.1
        solver.dc[0, 2] = 99.0  # beyond the last call so far: not a number of the solver
    found = solver.numbers()
    assert [float(t) for t in found.times] == pytest.approx([8.0, 2.0, 0.5])
    told = [8.0, 2.0 * torch.tensor(0.3).exp().item(), 0.5]
    assert [float(t) for t in found.told] == pytest.approx(told)
    a, c = ([[float(x) for x in row] for row in rows] for rows in (found.a, found.c))
    assert a[0] == pytest.approx([0.25])
    assert a[1] == pytest.approx([0.0, 0.25 + 0.1 / (1 + 2.0)])
    assert a[2] == pytest.approx([0.7 / (1 + 8.0), 0.0, 0.0])
    assert c[0] == pytest.approx([0.75])
    assert c[1] == pytest.approx([-0.2, base.c[1][1]])
    assert c[2] == pytest.approx([0.0, 0.0, 1.0])
    with torch.no_grad():
        solver.theta[0] += 1.0
    odds = (2.0 - 0.002) / (8.0 - 2.0) * torch.tensor(1.0).exp().item()
    second = 0.002 + (8.0 - 0.002) * odds / (1 + odds)
    third = 0.002 + (second - 0.002) * (0.5 - 0.002) / (2.0 - 0.002)
    assert [float(t) for t in solver.times()] == pytest.approx([8.0, second, third])


@each_path
def test_every_number_has_a_gradient(path: NoisePath) -> None:
    """Through all calls; none beyond the lower triangle."""
    teacher: Any = TEACHERS["mixture"](path)
    method = GAS(LinearSolver(4, order=3), Pairs(64), SquaredL2(), gan=0)
    nets, solver = started(method, teacher)
    batch = make_pairs(method.pairs, Generator(teacher, Heun(steps=2), (2,)), source)
    pairs = batch(Draws.range(0, 16))
    pairs = pairs._replace(more={**pairs.more, "pair_x0": pairs.more["pair_x0"].double() * 0})
    loss = method.student_loss(nets, teacher, pairs).total
    assert loss is not None
    loss.backward()
    assert bool((solver.theta.grad != 0).all())
    assert bool((solver.xi.grad[1:] != 0).all())
    triangle = torch.ones(4, 4).tril().bool()
    for grad in (solver.da.grad, solver.dc.grad):
        assert torch.equal(grad != 0, triangle)
        assert bool(grad.isfinite().all())


def pairs_of(teacher: Any, sampler: Any, count: int = 512) -> Any:
    return make_pairs(Pairs(count), Generator(teacher, sampler, (2,)), source)


def test_the_teacher_s_own_few_calls_are_a_fixed_point() -> None:
    """Pairs made by the solver itself: loss and gradient zero; other times: not."""
    teacher: Any = TEACHERS["mixture"](Flow())
    start = LinearSolver(4, order=3)
    batch = pairs_of(teacher, start, 64)(Draws.range(0, 32))
    batch = batch._replace(more={k: v.double() for k, v in batch.more.items()})
    for sampler, exact in ((start, True), (LinearSolver(4, order=3, shift=0.6), False)):
        method = GAS(sampler, distance=SquaredL2(), gan=0)
        nets, solver = started(method, teacher)
        loss = method.student_loss(nets, teacher, batch).total
        assert loss is not None
        loss.backward()
        worst = max(float(p.grad.abs().max()) for p in solver.parameters())
        assert (float(loss.detach()) < 1e-10) == exact
        assert (worst < 1e-5) == exact


def rms(x: Tensor) -> float:
    return float((x**2).sum(1).mean().sqrt())


def test_on_new_noise_four_calls_are_better_than_eight_of_published_solvers() -> None:
    teacher: Any = TEACHERS["ring"](VE())
    fine = LinearSolver(60, order=2)
    method = GAS(LinearSolver(4, order=3), Pairs(512), SquaredL2(), gan=0)
    data = pairs_of(teacher, fine)
    optim = Optim(2e-3, (0.9, 0.99), decay="cosine")
    *_, record = train(
        method, teacher, teacher, data, batch=64, steps=150, optim=optim, ema=EMA(500)
    )
    z = Draws.range(10**6, 256).normal("z", (2,), F64)
    goal = fine(teacher, z)
    net, sampler = method.product(record.state.nets, record.state.average, teacher)
    assert net is teacher
    mine = rms(sampler(teacher, z) - goal)
    for calls in (4, 6, 8):
        law = Discrete(tuple(reversed(LinearSolver(calls).ladder(VE()))))
        for kind in ("dpm++", "unipc"):
            other = MultiStep(law, calls, kind)  # type: ignore[arg-type]
            assert mine < 0.8 * rms(other(teacher, z) - goal)
    assert mine < 0.35 * rms(method.sampler(teacher, z) - goal)


def conditional() -> tuple[GAS, Nets, Any, Batch]:
    teacher = network(0).double().requires_grad_(False)
    method = GAS(LinearSolver(3), gan=0.4)
    nets = method.init(teacher, network(1).double())
    draws = Draws.range(0, 6)
    more = {name: draws.normal(name, (2,), F64) for name in ("pair_z", "pair_x0")}
    more["pair_cond"] = draws.integers("label", 3)
    batch = Batch(draws.normal("z", (2,), F64), draws.integers("other", 3), None, draws, more)
    return method, nets, teacher, batch


def test_the_adversarial_loss_by_hand() -> None:
    """Samples of z against the teacher's of other noise, both of the pairs' conditions."""
    method, nets, teacher, batch = conditional()
    pair_z, x0, cond = (batch.more[f"pair_{name}"] for name in ("z", "x0", "cond"))
    t = torch.full((6,), VE().t_min, dtype=F64)
    own, other = (LinearSolver(3)(teacher, z, cond) for z in (pair_z, batch.z))
    real, fake = (method.judge.logits(nets, teacher, x, t, cond) for x in (x0, other))
    loss = method.student_loss(nets, teacher, batch)
    adverse = softplus(real - fake).mean()
    distance = (own - x0).abs().mean()
    torch.testing.assert_close(loss.logs["gan_loss"], adverse, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss.total, distance + 0.4 * adverse, rtol=1e-6, atol=1e-8)
    judged = method.judge_loss(nets, teacher, batch)
    penalties = judged.logs["penalty_real"] + judged.logs["penalty_fake"]
    expected = softplus(fake - real).mean() + penalties
    torch.testing.assert_close(judged.total, expected, rtol=1e-6, atol=1e-8)
    assert float(penalties.detach()) > 0


def test_its_turns_and_what_it_ships() -> None:
    method, nets, teacher, _ = conditional()
    assert [(turn.net, turn.rate) for turn in method.turns(0)] == [
        ("discriminator", 0.05),
        ("student", 5.0),
    ]
    assert [turn.net for turn in GAS(gan=0).turns(0)] == ["student"]
    assert GAS(updates=7).length == 7
    guided = GAS(LinearSolver(3), gan=0, kappa=2.0)
    sampler = guided.product(nets, nets["student"], teacher).sampler
    assert isinstance(sampler, CFG)
    assert sampler.calls == 6


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GAS(Heun()), "GAS.sampler is a LinearSolver without numbers"),
        (
            lambda: GAS(LinearSolver(times=(1.0,), a=((0.0,),), c=((1.0,),))),
            "GAS.sampler is a LinearSolver without numbers",
        ),
        (lambda: GAS(gan=-1.0), "GAS needs gan of 0 or more, updates of 1"),
        (lambda: GAS(updates=0), "GAS needs gan of 0 or more, updates of 1"),
        (lambda: GAS(judge_rate=0.0), "GAS needs gan of 0 or more, updates of 1"),
        (
            lambda: GAS(judge=Discriminator(features="fake", pool="channels")),
            "GAS has no fake score to judge by",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_teacher_that_cannot_be_shipped_is_refused() -> None:
    function: Any = lambda xt, t, cond=None: xt  # noqa: E731
    with pytest.raises(ValueError, match="GAS needs a teacher that is a network"):
        GAS().init(function, GaussianMixture.ring())
