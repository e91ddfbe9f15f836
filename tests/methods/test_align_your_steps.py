"""Align Your Steps: the programme against brute force, golden bounds, and what is measured."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete, Karras
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Step
from fewstep.methods.align_your_steps import AlignYourSteps, shortest, step_costs
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.instances import TEACHERS

F64 = torch.float64
LEVELS = torch.linspace(math.log(10.0), math.log(0.02), 96, dtype=F64).exp()


def golden() -> GaussianMixture:
    weights, means = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[-1.0], [0.6]], dtype=F64)
    return GaussianMixture(means, torch.tensor([[0.05], [0.1]], dtype=F64), weights)


def exact_errors() -> Tensor:
    """E |x_0 - f(x_s)|^2 of the golden mixture by quadrature: E x_0^2 - E f^2."""
    net, x = golden(), torch.linspace(-60, 60, 12001, dtype=F64)[:, None]
    second = 0.3 * (0.05 + 1.0) + 0.7 * (0.1 + 0.36)
    out = []
    for level in LEVELS:
        density = net.log_prob(x, level).exp()
        out.append(second - (density * net(x, level)[:, 0] ** 2).sum() * 0.01)
    return torch.stack(out)


def bound(costs: Tensor, path: list[int]) -> float:
    return float(sum(costs[i, j] for i, j in pairwise(path)))


def test_golden_bounds_and_times() -> None:
    """4 steps 6.08 (Karras 30.5, even in ln s 13.8), 8 steps 2.08 (6.05, 3.64)."""
    costs = step_costs(LEVELS, exact_errors())
    known = {4: (6.08, 30.5, 13.8), 8: (2.08, 6.05, 3.64)}
    for steps, values in known.items():
        top, low = 10.0 ** (1 / 7), 0.02 ** (1 / 7)
        ladder = [(top + k / steps * (low - top)) ** 7 for k in range(steps + 1)]
        karras = [int((LEVELS.log() - math.log(s)).abs().argmin()) for s in ladder]
        even = [round(k * 95 / steps) for k in range(steps + 1)]
        best = shortest(costs, steps)
        found = [bound(costs, path) for path in (best, karras, even)]
        assert found == pytest.approx(values, rel=6e-3)
        if steps == 4:
            times = [float(LEVELS[n]) for n in best]
            assert times == pytest.approx([10.0, 0.356, 0.125, 0.05, 0.02], abs=6e-4)


def test_the_programme_is_brute_force() -> None:
    """Any costs, three steps, all paths."""
    costs = torch.rand(12, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    costs = torch.where(torch.ones_like(costs).triu(1) > 0, costs, torch.inf)
    found = shortest(costs, 3)
    least = min(bound(costs, [0, *mid, 11]) for mid in combinations(range(1, 11), 2))
    assert bound(costs, found) == pytest.approx(least, rel=1e-12)
    assert (found[0], found[-1], len(found)) == (0, 11, 4)


def test_the_cost_of_a_step_is_the_integral() -> None:
    """Of a Gaussian's errors, against a sum over many levels."""
    levels = torch.linspace(math.log(3.0), math.log(0.1), 400, dtype=F64).exp()
    costs = step_costs(levels, 0.25 * levels**2 / (0.25 + levels**2))
    i, j = 50, 320
    s = torch.linspace(float(levels[i]), float(levels[j]), 200_001, dtype=F64)
    inner = (0.25 * s[0] ** 2 / (0.25 + s[0] ** 2) - 0.25 * s**2 / (0.25 + s**2)) / s**3
    assert float(costs[i, j]) == pytest.approx(-float(torch.trapezoid(inner, s)), rel=2e-4)
    assert costs[j, i] == costs[i, i] == math.inf


def run(method: AlignYourSteps, teacher: Any, data: Tensor) -> Any:
    nets = method.init(teacher, teacher).to(F64)
    for start in range(method.length):
        draws = Draws.range(1000 * start, len(data))
        batch = Batch(draws.normal("z", data.shape[1:], F64), None, data, draws)
        (turn,) = method.turns(start)
        sums = turn.loss(nets, teacher, batch).sums
        done = Step(nets, nets["student"], start, 0, len(data), sums)
        method.after_step(done)
    return method.product(nets, nets["student"], teacher).sampler


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=lambda p: type(p).__name__)
def test_what_is_measured_is_the_teacher_s_error(path: NoisePath) -> None:
    """On a Gaussian V l^2 / (V + l^2), whatever the path; and the times that it leads to."""
    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)
    method = AlignYourSteps(LinearSolver(4), rungs=24, batches=1)
    data = 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    draws = Draws.range(0, 4000)
    loss = method.measure(None, teacher, Batch(data, None, data, draws))  # type: ignore[arg-type]
    times = torch.tensor(method.ladder(path), dtype=F64)
    level = (path.sigma(times) / path.alpha(times)).clamp(max=1e6)
    expected = 0.25 * level**2 / (0.25 + level**2)
    found = loss.sums["errors"] / loss.sums["count"]
    torch.testing.assert_close(found, expected, rtol=0.08, atol=1e-5)
    sampler = run(method, teacher, data)
    assert isinstance(sampler, LinearSolver)
    exact = method.schedule(path, expected)
    assert sampler.times[0] == exact[0] == times[0]
    shares = [path.flow_time(torch.tensor(t, dtype=F64)) for t in (sampler.times, exact)]
    torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0.1)


def test_errors_that_fall_with_the_noise_level_count_as_risen() -> None:
    """Without noise m grows with the level: a measurement that dips is as large as those below."""
    method, path = AlignYourSteps(LinearSolver(4), rungs=24), VE()
    times = torch.tensor(method.ladder(path), dtype=F64)
    level = path.sigma(times)
    risen = 0.25 * level**2 / (0.25 + level**2)
    risen[8:12] = risen[12]
    dips = risen.clone()
    dips[8:12] *= torch.tensor([0.2, 0.9, 0.5, 0.7], dtype=F64)
    assert method.schedule(path, dips) == method.schedule(path, risen)
    assert method.schedule(path, dips.flip(0)) != method.schedule(path, risen)


def test_what_it_ships() -> None:
    """The given sampler with other times; before any step it is the given one."""
    teacher: Any = TEACHERS["mixture"](VE())
    data = teacher.sample(256, torch.Generator().manual_seed(0))
    given = MultiStep(Karras(0.02, 20.0), 5, "unipc", order=3)
    method = AlignYourSteps(given, rungs=16, batches=2, kappa=1.0)
    nets = method.init(teacher, teacher)
    assert method.product(nets, nets["student"], teacher).sampler == given
    sampler = run(method, teacher, data)
    assert isinstance(sampler, MultiStep)
    assert isinstance(sampler.times, Discrete)
    assert (sampler.steps, sampler.kind, sampler.order) == (5, "unipc", 3)
    ladder = sampler.grid(data).tolist()
    assert ladder[0] == pytest.approx(20.0)
    assert ladder == sorted(ladder, reverse=True)
    guided = AlignYourSteps(LinearSolver(3), kappa=2.0).product(nets, nets["student"], teacher)
    assert isinstance(guided.sampler, CFG)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AlignYourSteps(Heun()), "AlignYourSteps.sampler is a MultiStep, or a LinearS"),
        (lambda: AlignYourSteps(rungs=6), "needs more rungs than the 6 steps"),
        (lambda: AlignYourSteps(batches=0), "needs more rungs than the 6 steps"),
        (
            lambda: AlignYourSteps().init(
                TEACHERS["ring"](VP(betas=(0.1, 0.2, 0.5))), GaussianMixture.ring()
            ),
            "does not fit|there are 3 times to choose from",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
