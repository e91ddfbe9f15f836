"""Optimal steps: the programme against all paths, on an exact mixture."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VP
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.methods.optimal_steps import OptimalSteps, Schedule
from fewstep.teachers.gaussian import GaussianMixture
from tests.instances import PATHS, TEACHERS
from tests.quadrature import F64

LADDER = Heun(Karras(0.05, 20.0, rho=4.0), steps=9, order=1)


def noise(count: int) -> Batch:
    draws = Draws.range(0, count)
    return Batch(draws.normal("z", (2,), F64), None, None, draws)


def visited(teacher: Any, z: Tensor, times: list[float]) -> Tensor:
    """Samples by deterministic steps between these times, and to the data from the last."""
    t = [torch.tensor(time, dtype=F64) for time in times]
    x = teacher.path.sigma(t[0]) * z
    for here, there in pairwise(t):
        x = teacher.path.ddim(x, teacher(x, here), here, there)
    out: Tensor = teacher(x, t[-1])
    return out


def error(teacher: Any, batch: Batch, path: tuple[int, ...]) -> Tensor:
    """Mean square distance of each sample to that of the whole ladder."""
    grid = LADDER.grid(batch.z).tolist()
    whole = visited(teacher, batch.z, grid)
    return ((visited(teacher, batch.z, [grid[n] for n in path]) - whole) ** 2).mean(1)


def chosen(m: OptimalSteps, teacher: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    found = m.search(Nets(), teacher, batch)
    return found.sums["votes"], dict(found.logs)


def test_two_calls_of_one_sample_are_the_best_of_all() -> None:
    """With two calls the first state is free, so that greed costs nothing: exact."""
    teacher = TEACHERS["mixture"](PATHS[0])
    for number in range(6):
        batch = noise(6)
        one = batch._replace(z=batch.z[number : number + 1])
        votes, logs = chosen(OptimalSteps(LADDER, 2), teacher, one)
        costs = {(0, n): float(error(teacher, one, (0, n))) for n in range(1, 9)}
        best = min(costs, key=costs.__getitem__)
        assert [row.nonzero().item() for row in votes] == list(best)
        assert float(logs["error"]) == pytest.approx(costs[best], rel=1e-9)
        assert costs[best] < 0.9 * costs[0, 4]  # the even ladder


@pytest.mark.parametrize("calls", [3, 4])
def test_more_calls_come_near_the_best_of_all_paths(calls: int) -> None:
    """The paths of a batch: never below brute force, within twice of it, below the even one."""
    teacher, batch = TEACHERS["mixture"](PATHS[0]), noise(64)
    votes, logs = chosen(OptimalSteps(LADDER, calls, nearest="batch"), teacher, batch)
    path = tuple(int(row.argmax()) for row in votes)
    assert bool((votes.max(1).values == 64).all())
    costs = {
        (0, *rest): float(error(teacher, batch, (0, *rest)).mean())
        for rest in combinations(range(1, 9), calls - 1)
    }
    assert float(logs["error"]) == pytest.approx(costs[path], rel=1e-9)
    least = min(costs.values())
    even = costs[tuple(k * 9 // calls for k in range(calls))]
    assert least <= costs[path] < 2 * least
    assert costs[path] < 0.7 * even


class Waves:
    """No denoiser of any law: the last state to arrive at a time is often not the nearest."""

    path = PATHS[0]

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        t = t[:, None] if t.ndim else t
        return torch.sin(4 * x / t) * t.clamp(max=2)


@pytest.mark.parametrize("teacher", [TEACHERS["ring"](PATHS[0]), Waves()], ids=["ring", "waves"])
def test_the_error_is_that_of_the_path_for_every_sample(teacher: Any) -> None:
    """What is kept at a time is the state of the path that leads there, sample by sample."""
    batch = noise(40)
    for number in range(40):
        one = batch._replace(z=batch.z[number : number + 1])
        votes, logs = chosen(OptimalSteps(LADDER, 4), teacher, one)
        path = tuple(int(row.argmax()) for row in votes)
        assert float(logs["error"]) == pytest.approx(float(error(teacher, one, path)), rel=1e-9)


def test_samples_do_not_hear_of_one_another() -> None:
    """What a batch votes for, and its error, are those of its samples one by one."""
    teacher, batch = TEACHERS["ring"](PATHS[0]), noise(40)
    m = OptimalSteps(LADDER, 4)
    together, logs = chosen(m, teacher, batch)
    each = [chosen(m, teacher, batch._replace(z=one[None])) for one in batch.z]
    assert torch.equal(together, torch.stack([votes for votes, _ in each]).sum(0))
    mean = sum(float(alone["error"]) for _, alone in each) / 40
    assert float(logs["error"]) == pytest.approx(mean, rel=1e-9)


def test_all_times_are_the_teacher_itself() -> None:
    teacher, batch = TEACHERS["mixture"](PATHS[0]), noise(5)
    votes, logs = chosen(OptimalSteps(LADDER, 9), teacher, batch)
    assert torch.equal(votes, 5 * torch.eye(9))
    assert float(logs["error"]) < 1e-25


def test_the_schedule_is_the_median_of_the_votes() -> None:
    schedule = Schedule(2, 6)
    assert schedule.path() == [0, 3]
    schedule.votes[0, 0] = 5
    schedule.votes[1] = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    assert schedule.path() == [0, 3]
    schedule.votes[1, 1] += 2
    assert schedule.path() == [0, 1]


def test_the_product_is_the_teacher_at_the_chosen_times() -> None:
    teacher, batch = TEACHERS["mixture"](PATHS[0]), noise(7)
    m = OptimalSteps(LADDER, 3)
    nets = m.init(teacher, teacher)
    student: Any = nets["student"]
    student.votes[0, 0] = student.votes[1, 4] = student.votes[2, 7] = 1
    net, sampler = m.product(nets, student, teacher)
    assert net is teacher
    assert sampler.calls == 3
    grid = LADDER.grid(batch.z).tolist()
    expected = visited(teacher, batch.z, [grid[n] for n in (0, 4, 7)])
    torch.testing.assert_close(sampler(teacher, batch.z), expected, rtol=1e-12, atol=1e-12)
    assert sampler == FewStep(noise="ddim", times=tuple(grid[n] for n in (0, 4, 7)))
    guided = OptimalSteps(LADDER, 3, kappa=2.0).product(nets, student, teacher).sampler
    assert guided == CFG(sampler, 2.0)


def test_unit_noise_starts_the_search_and_the_product() -> None:
    """Of timesteps: the first state is z, not sigma z, in the teacher's states too."""
    teacher: Any = TEACHERS["mixture"](VP())
    ladder, batch = Heun(Uniform(99.0, 899.0), 5, 1), noise(6)
    path = teacher.path
    grid = ladder.grid(batch.z).round()
    for unit in (True, False):
        m = OptimalSteps(ladder, 5, unit=unit)
        x = batch.z if unit else path.sigma(grid[0]) * batch.z
        for here, there in pairwise(grid):
            x = path.ddim(x, teacher(x, here), here, there)
        nets = m.init(teacher, teacher)
        student: Any = nets["student"]
        student.votes += m.search(nets, teacher, batch).sums["votes"]
        sampler = m.product(nets, student, teacher).sampler
        assert isinstance(sampler, FewStep)
        assert sampler.unit == unit
        found = sampler(teacher, batch.z)
        torch.testing.assert_close(found, teacher(x, grid[-1]), rtol=1e-9, atol=1e-9)
        assert float(m.search(nets, teacher, batch).logs["error"]) < 1e-25
    one = [
        OptimalSteps(ladder, 2, unit=unit).search(nets, teacher, batch) for unit in (True, False)
    ]
    assert one[0].logs["error"] != one[1].logs["error"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimalSteps(LADDER, 10),
        lambda: OptimalSteps(LADDER, 0),
        lambda: OptimalSteps(Heun()),
        lambda: OptimalSteps(FewStep()),
        lambda: OptimalSteps(nearest="all"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"OptimalSteps(\.| needs)"):
        make()


def test_a_teacher_that_cannot_be_shipped_is_refused() -> None:
    function: Any = lambda xt, t, cond=None: xt  # noqa: E731
    with pytest.raises(ValueError, match="a teacher that is a network"):
        OptimalSteps().init(function, GaussianMixture.ring())
