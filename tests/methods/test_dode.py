"""D-ODE: least squares as they are, golden numbers, and what the numbers gain on new noise."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver, Numbers, is_pure_noise
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Denoiser
from fewstep.distillation.method import Nets, Step
from fewstep.methods.dode import DODE, Scalars
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.diffusion.test_linear_solver import golden_mixture, golden_noise, karras
from tests.instances import TEACHERS

F64 = torch.float64
PATHS: tuple[NoisePath, ...] = (VE(), Flow(), TrigFlow(), VP())
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def noise(start: int, count: int) -> Batch:
    draws = Draws.range(start, count)
    return Batch(draws.normal("z", (2,), F64), None, None, draws)


def fitted(method: DODE, teacher: Any, batch: Batch) -> tuple[LinearSolver, list[float]]:
    """The solver that the steps of a run make, all of the same batch; and the numbers found."""
    nets = method.init(teacher, teacher)
    nets.to(F64)
    for number in range(method.length):
        (turn,) = method.turns(number)
        done = Step(
            nets, nets["student"], number, 0, len(batch.z), turn.loss(nets, teacher, batch).sums
        )
        method.after_step(done)
        assert done.restarted == ["student"]
    scalars: Any = nets["student"]
    sampler = method.product(nets, nets["student"], teacher).sampler
    assert isinstance(sampler, LinearSolver)
    return sampler, scalars.weights().tolist()


def rms(x: Tensor) -> float:
    return float((x**2).sum(1).mean().sqrt())


@cache
def exact(path: NoisePath, name: str, start: int = 10**6, count: int = 256) -> Tensor:
    """Samples of the exact flow from new noise."""
    method = DODE(LinearSolver(4), fine=60)
    teacher, batch = TEACHERS[name](path), noise(start, count)
    return method.trajectory(teacher, batch, method.sampler.numbers(path), 3)  # type: ignore[attr-defined]


@each_path
def test_the_teacher_s_trajectory_is_the_flow(path: NoisePath) -> None:
    """Of a Gaussian, in closed form: between two times, and down to the data's end."""
    mean = torch.tensor([0.4, -0.7], dtype=F64)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    teacher, batch = Gaussian(mean, cov, path), noise(0, 32)
    method = DODE(LinearSolver(4), fine=80)
    numbers = LinearSolver(4).numbers(path)
    top, _, third, _ = (float(t) for t in numbers.times)
    start = path.sigma(torch.tensor(top, dtype=F64)) * batch.z
    found = method.trajectory(teacher, batch, numbers, 1)
    torch.testing.assert_close(found, teacher.flow(start, top, third), rtol=2e-3, atol=2e-3)
    found = method.trajectory(teacher, batch, numbers, 3)
    low = torch.tensor(path.t_min, dtype=F64)
    ends = teacher(teacher.flow(start, top, path.t_min), low)
    torch.testing.assert_close(found, ends, rtol=2e-3, atol=2e-3)
    coarse = DODE(LinearSolver(4), fine=80, order=1).trajectory(teacher, batch, numbers, 3)
    assert (found - ends).norm() < 0.2 * (coarse - ends).norm()


@each_path
def test_what_is_left_is_orthogonal_to_the_change(path: NoisePath) -> None:
    """<X_(n+1) - x_(n+1), f_n - f_(n-1)> = 0 for each step of the finished solver."""
    teacher, batch = TEACHERS["mixture"](path), noise(0, 64)
    method = DODE(LinearSolver(4))
    sampler, weights = fitted(method, teacher, batch)
    states = list(sampler.states(teacher, batch.z))
    last = teacher(states[-1].xt, states[-1].t)
    predictions = [*(state.x0 for state in states[:-1]), last]
    assert weights[0] == 0
    for n in range(1, 4):
        change = predictions[n] - predictions[n - 1]
        goal = method.trajectory(teacher, batch, LinearSolver(4).numbers(path), n)
        left = goal - states[n].xs
        assert abs(float((change * left).sum())) < 1e-9 * float(change.norm() * goal.norm())
        plain = left + weights[n] * change
        assert left.norm() < plain.norm()


def test_golden_numbers() -> None:
    """On Karras's six times from 20 z: the numbers, and 0.107 where DDIM has 0.254."""
    teacher = golden_mixture()
    batch = Batch(golden_noise())
    method = DODE(LinearSolver(times=karras(6)), fine=24)
    sampler, weights = fitted(method, teacher, batch)
    known = [0.0, 1.25251, 1.08343, 0.265962, 0.136843, -0.515756]
    assert weights == pytest.approx(known, rel=0.02)
    goal = method.trajectory(teacher, batch, LinearSolver(times=karras(6)).numbers(VE()), 5)
    assert rms(sampler(teacher, batch.z) - goal) == pytest.approx(0.10665, rel=0.02)
    ddim = LinearSolver(times=karras(6))
    assert rms(ddim(teacher, batch.z) - goal) == pytest.approx(0.253752, rel=0.01)


@each_path
def test_a_second_order_solver_is_one_of_the_family(path: NoisePath) -> None:
    """With DPM-Solver++(2M) as the trajectory, its numbers over DDIM are found to rounding."""
    other = LinearSolver(5, order=2)

    class Towards(DODE):
        def trajectory(self, teacher: Denoiser, batch: Batch, numbers: Numbers, n: int) -> Tensor:
            return [state.xs for state in other.states(teacher, batch.z)][n]

    teacher, batch = TEACHERS["mixture"](path), noise(0, 16)
    sampler, weights = fitted(Towards(LinearSolver(5)), teacher, batch)
    numbers = other.numbers(path)
    t = torch.tensor(numbers.times, dtype=F64)
    rungs = (path.alpha(t) / path.sigma(t)).log()
    if is_pure_noise(path, float(t[0])):
        rungs[0] = -torch.inf
    for n in range(1, 4):
        h, r = rungs[n + 1] - rungs[n], (rungs[n] - rungs[n - 1]) / (rungs[n + 1] - rungs[n])
        known = -path.alpha(t[n + 1]) * torch.expm1(-h) / (2 * r)
        assert weights[n] == pytest.approx(float(known), rel=1e-9, abs=1e-12)
    assert weights[4] == pytest.approx(0, abs=1e-12)
    found, expected = sampler(teacher, batch.z), other(teacher, batch.z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [VE(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("calls", [4, 6, 10])
def test_on_new_noise_it_is_nearer_than_published_solvers(path: NoisePath, calls: int) -> None:
    """At equal calls and equal times on a ring: below DPM-Solver++ and UniPC.

    On smoother mixtures UniPC, of third order, is the better one from eight calls on.
    """
    teacher = TEACHERS["ring"](path)
    sampler, _ = fitted(DODE(LinearSolver(calls), fine=6), teacher, noise(0, 256))
    z, goal = noise(10**6, 256).z, exact(path, "ring")
    law = Discrete(tuple(reversed(LinearSolver(calls).ladder(path))))
    others = {
        "ddim": Heun(law, calls, 1),
        "dpm++": MultiStep(law, calls, "dpm++"),
        "unipc": MultiStep(law, calls, "unipc"),
    }
    mine = rms(sampler(teacher, z) - goal)
    found = {name: rms(other(teacher, z) - goal) for name, other in others.items()}
    assert mine < 0.4 * found["ddim"]
    assert mine < 0.96 * min(found["dpm++"], found["unipc"])


def test_the_numbers_are_means_over_all_batches() -> None:
    """Sums of two halves make the number of the whole, where a mean of ratios would not."""
    scalars = Scalars(3)
    scalars.products += torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
    scalars.products += torch.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 3.0]])
    assert scalars.weights().tolist() == [0.0, 0.5, 0.75]
    method = DODE(LinearSolver(4), batches=3)
    assert method.length == 9
    steps = [turn.loss.args[0] for k in range(10) for turn in method.turns(k)]  # type: ignore[attr-defined]
    assert steps == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]


def test_before_the_first_step_it_is_the_plain_solver() -> None:
    teacher: Any = TEACHERS["mixture"](VE())
    method = DODE(LinearSolver(3, order=2), kappa=2.0)
    nets = method.init(teacher, teacher)
    sampler = method.product(nets, nets["student"], teacher).sampler
    assert isinstance(sampler, CFG)
    assert sampler.kappa == 2.0
    z = noise(0, 8).z
    found = sampler.sampler(teacher, z)
    torch.testing.assert_close(found, LinearSolver(3, order=2)(teacher, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DODE(Heun(order=1)),
        lambda: DODE(LinearSolver(1)),
        lambda: DODE(fine=0),
        lambda: DODE(order=3),
        lambda: DODE(batches=0),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any) -> None:
    refusal = r"DODE(\.sampler is a Linear|\.order is 1 or 2| needs fine and batches)"
    with pytest.raises(ValueError, match=refusal):
        make()


def test_a_teacher_that_cannot_be_shipped_is_refused() -> None:
    function: Any = lambda xt, t, cond=None: xt  # noqa: E731
    with pytest.raises(ValueError, match="DODE needs a teacher that is a network"):
        DODE().init(function, GaussianMixture.ring())


def test_only_the_number_in_question_is_measured() -> None:
    teacher = TEACHERS["mixture"](VE())
    method, batch = DODE(LinearSolver(4)), noise(0, 8)
    nets: Nets = method.init(teacher, teacher)
    for n in (1, 3):
        products = method.measure(n, nets, teacher, batch).sums["products"]
        assert [row for row in range(4) if float(products[row].abs().sum()) > 0] == [n]
