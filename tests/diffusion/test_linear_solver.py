"""Linear solvers: DDIM and DPM-Solver++ by other code, by hand, and by golden numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.linear_solver import LinearSolver, Numbers, rows_of_order, walk
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.teachers.gaussian import GaussianMixture
from tests.instances import TEACHERS

F64 = torch.float64
Z = Draws.range(0, 32).normal("z", (2,), F64)
PATHS: tuple[NoisePath, ...] = (VE(), Flow(), TrigFlow(), VP())
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


@each_path
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_orders_one_and_two_are_ddim_and_dpm(path: NoisePath, steps: int) -> None:
    """Flow and TrigFlow start at pure noise, whose call tells no slope."""
    net = TEACHERS["mixture"](path)
    law = Discrete(tuple(reversed(LinearSolver(steps).ladder(path))))
    for order, other in ((1, Heun(law, steps, 1)), (2, MultiStep(law, steps, "dpm++"))):
        found = LinearSolver(steps, order=order)(net, Z)
        torch.testing.assert_close(found, other(net, Z), rtol=1e-12, atol=1e-12)
    assert steps < 3 or (found - LinearSolver(steps)(net, Z)).abs().max() > 1e-3


def golden_mixture() -> GaussianMixture:
    """Five round Gaussians on a circle, in double precision."""
    angle = torch.arange(5, dtype=F64) * 2 * math.pi / 5
    variances = torch.tensor([0.02, 0.05, 0.03, 0.08, 0.04], dtype=F64)
    weights = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=F64)
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, variances[:, None].expand(-1, 2), weights)


def golden_noise() -> Tensor:
    return torch.randn(512, 2, generator=torch.Generator().manual_seed(9), dtype=F64)


def karras(steps: int) -> tuple[float, ...]:
    """EDM's times from 20 to 0.01."""
    top, bottom = 20.0 ** (1 / 7), 0.01 ** (1 / 7)
    return tuple(float((top + k / (steps - 1) * (bottom - top)) ** 7) for k in range(steps))


def flowed(net: GaussianMixture, z: Tensor, steps: int = 400) -> Tensor:
    """The exact flow from 20 z to 0.001 by Runge and Kutta's method, and its prediction."""
    rungs = torch.linspace(-math.log(20.0), -math.log(1e-3), steps + 1, dtype=F64)
    x, h = 20 * z, float(rungs[1] - rungs[0])

    def slope(x: Tensor, rung: Tensor) -> Tensor:
        out: Tensor = net(x, (-rung).exp()) - x
        return out

    for at in rungs[:-1]:
        k1 = slope(x, at)
        k2 = slope(x + h / 2 * k1, at + h / 2)
        k3 = slope(x + h / 2 * k2, at + h / 2)
        k4 = slope(x + h * k3, at + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    end: Tensor = net(x, torch.tensor(1e-3, dtype=F64))
    return end


def test_order_three_as_published_by_golden_numbers() -> None:
    """Root mean square distances to the exact flow at 4, 6, 8 and 10 calls, on Karras's times."""
    net, z = golden_mixture(), golden_noise()
    exact = flowed(net, z)
    known = {1: (0.330, 0.254, 0.178, 0.139), 2: (0.239, 0.215, 0.142, 0.0932)}
    known[3] = (0.798, 0.508, 0.145, 0.0472)
    for order, values in known.items():
        for steps, value in zip((4, 6, 8, 10), values, strict=True):
            x = LinearSolver(times=karras(steps), order=order)(net, z)
            rms = float(((x - exact) ** 2).sum(1).mean().sqrt())
            assert rms == pytest.approx(value, rel=5e-3)


@each_path
def test_order_three_by_hand(path: NoisePath) -> None:
    """The fourth state of four, from three predictions; the first tells nothing on pure noise."""
    net, solver = TEACHERS["mixture"](path), LinearSolver(5, order=3)
    states = list(solver.states(net, Z))
    t = torch.tensor(solver.ladder(path), dtype=F64)
    rungs = (path.alpha(t) / path.sigma(t)).log()
    f = [state.x0 for state in states]
    h = rungs[4] - rungs[3]
    r0, r1 = (rungs[3] - rungs[2]) / h, (rungs[2] - rungs[1]) / h
    e0, e1 = (f[3] - f[2]) / r0, (f[2] - f[1]) / r1
    first, second = e0 + r0 / (r0 + r1) * (e0 - e1), (e0 - e1) / (r0 + r1)
    p1 = torch.expm1(-h)
    p2 = p1 / h + 1
    p3 = p2 / h - 0.5
    x = path.sigma(t[4]) / path.sigma(t[3]) * states[3].xt
    x = x + path.alpha(t[4]) * (-p1 * f[3] + p2 * first - p3 * second)
    torch.testing.assert_close(states[3].xs, x, rtol=1e-10, atol=1e-10)
    twice = x - path.alpha(t[4]) * p3 * second
    assert (twice - x).abs().max() > 1e-4  # Taylor's own third order is another


@each_path
def test_times_are_even_in_the_noise_share(path: NoisePath) -> None:
    """v = level / (level + shift) falls evenly to zero from that of the first time."""
    times = torch.tensor(LinearSolver(4, shift=0.5).ladder(path), dtype=F64)
    level = path.sigma(times) / path.alpha(times)
    v = 1 / (1 + 0.5 / level)
    expected = v[0] * torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64)
    torch.testing.assert_close(v, expected, rtol=0.02 if isinstance(path, VP) else 1e-6, atol=0)
    assert float(times[0]) == path.t_max
    assert not isinstance(path, VP) or torch.equal(times, times.round())


def test_numbers_of_its_own_by_hand() -> None:
    """Two calls: every number in its place, and what the network is told."""
    net = TEACHERS["mixture"](VE())
    solver = LinearSolver(
        times=(2.0, 0.5), told=(2.2, 0.4), a=((0.3,), (0.05, 0.2)), c=((0.6,), (-0.1, 0.9))
    )
    first, last = solver.states(net, Z)
    assert solver.calls == 2
    f1 = net(2 * Z, torch.tensor(2.2, dtype=F64))
    x2 = 0.3 * 2 * Z + 0.6 * f1
    f2 = net(x2, torch.tensor(0.4, dtype=F64))
    torch.testing.assert_close(first.xs, x2, rtol=1e-14, atol=1e-14)
    expected = 0.05 * 2 * Z + 0.2 * x2 - 0.1 * f1 + 0.9 * f2
    torch.testing.assert_close(last.x0, expected, rtol=1e-14, atol=1e-14)
    assert [float(first.t[0]), float(first.s[0]), float(last.t[0])] == [2.0, 0.5, 0.5]


@each_path
@pytest.mark.parametrize("order", [2, 3])
def test_the_gradient_in_the_times_is_finite(path: NoisePath, order: int) -> None:
    """From pure noise too; against a difference, between the bends of a path of timesteps."""
    ladder = torch.tensor(LinearSolver(4).ladder(path), dtype=F64)
    if isinstance(path, VP):
        ladder[1:] -= 0.3
    net = TEACHERS["mixture"](path)

    def sample(times: Tensor) -> Tensor:
        pure = not isinstance(path, VE | VP)
        numbers: Any = rows_of_order(path, times, order, pure)
        *_, last = walk(Numbers(times.unbind(), times.unbind(), *numbers), net, Z)
        return (last.x0 * Z.flip(0)).sum()

    times = ladder.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sample(times), times)
    assert bool(slope[1:].isfinite().all())
    step = torch.zeros_like(ladder)
    step[2] = 1e-5 * ladder[2]
    difference = (sample(ladder + step) - sample(ladder - step)) / (2 * step[2])
    assert float(slope[2]) == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LinearSolver(0), "needs steps >= 1, shift > 0 and order 1, 2 or 3"),
        (lambda: LinearSolver(shift=0.0), "needs steps >= 1, shift > 0 and order 1, 2 or 3"),
        (lambda: LinearSolver(order=4), "needs steps >= 1, shift > 0 and order 1, 2 or 3"),
        (lambda: LinearSolver(times=(1.0, 2.0)), "LinearSolver.times decrease"),
        (lambda: LinearSolver(times=(2.0, 1.0), told=(1.0,)), "told has one time for each"),
        (
            lambda: LinearSolver(2, a=((1.0,), (0.0, 1.0))),
            "are both empty, or have rows of 1 to 2",
        ),
        (
            lambda: LinearSolver(times=(2.0, 1.0), a=((1.0,), (1.0,)), c=((1.0,), (0.0, 1.0))),
            "are both empty, or have rows of 1 to 2",
        ),
    ],
)
def test_impossible_solvers_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_times_that_do_not_fit_the_path_are_refused() -> None:
    for solver in (LinearSolver(t_init=90.0), LinearSolver(times=(2.0, 0.0))):
        with pytest.raises(ValueError, match=r"does not fit the times 0\.002 to 80 of VE"):
            solver(TEACHERS["mixture"](VE()), Z)
    with pytest.raises(ValueError, match="in 3 steps does not fit the times 0 to 2 of VP"):
        LinearSolver(3)(TEACHERS["mixture"](VP(betas=(0.3, 0.5, 0.6))), Z)
