"""IBMD on a Gaussian coupling of x_0 and x_T, exactly: three signs make every mean of squares.

The networks here see y_t = x_t + t x_T alone; the teacher's regression, the loss of a student
th_0 + th_1 x_T + th_2 z and its gradient are those of closed forms.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import Bridge
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import FakeScore, Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.score import denoising, sid
from fewstep.losses.weight import Power
from fewstep.methods.ibmd import IBMD
from tests.quadrature import F64, Even

T, PATH = 0.4, Bridge()
MU0, MU1, S0, S1, COV = 0.7, -0.4, 0.3, 0.5, 0.2
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)
END = MU1 + math.sqrt(S1) * SIGNS[:, 1:2]
BATCH = Batch(SIGNS[:, :1], END, None, Even(torch.arange(8), noise=SIGNS[:, 2]))
THETA = (0.2, 0.1, 0.6)
STAR = (MU0 - COV / S1 * MU1, COV / S1, math.sqrt(S0 - COV**2 / S1))
"""The student that has the teacher's coupling."""
VALUE, GRADIENT = 0.14384083, (-0.53266826, 0.21466779, 0.0066068069)


class Regression(nn.Module):
    """p + k y_t, in which y_t = x_t + t x_T."""

    path = PATH

    def __init__(self, p: float, k: float) -> None:
        super().__init__()
        self.p, self.k = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (p, k))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.p + self.k * (xt + t.reshape(-1, 1) * cond)


class Student(nn.Module):
    """th_0 + th_1 x_T + th_2 z, z being its input over sigma."""

    path = PATH

    def __init__(self, *theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        parts = torch.ones_like(xt), cond, xt / self.path.sigma(t).reshape(-1, 1)
        return torch.cat(parts, 1) @ self.theta[:, None]


def regression(mean: float, variance: float, cov: float) -> tuple[float, float]:
    """p and k of E[x_0 | y_t] in a coupling with x_T."""
    spread = (1 - T) ** 2 * variance + T**2 * S1 + 2 * T * (1 - T) * cov + T * (1 - T)
    k = ((1 - T) * variance + T * cov) / spread
    return mean - k * ((1 - T) * mean + T * MU1), k


def of_student(theta: tuple[float, ...]) -> tuple[float, float]:
    a, b, c = theta
    return regression(a + b * MU1, b**2 * S1 + c**2, b * S1)


TEACHER = Regression(*regression(MU0, S0, COV))
METHOD = IBMD(times=Discrete((T,)), weight=Power(), fake=FakeScore(Discrete((T,)), Power()))
ROLLOUT = Rollout(METHOD.sampler, 1)


def nets(theta: tuple[float, ...] = THETA) -> Nets:
    return Nets({"student": Student(*theta), "fake": Regression(*of_student(theta))})


def gradient(loss: Tensor, net: nn.Module) -> list[float]:
    return [
        float(v) for g in torch.autograd.grad(loss, list(net.parameters())) for v in g.view(-1)
    ]


def test_the_teachers_regression() -> None:
    assert regression(MU0, S0, COV) == pytest.approx((0.57099237, 0.49618321), abs=5e-9)


def test_value_and_gradient_are_the_golden_ones() -> None:
    here = nets()
    loss = METHOD.student_loss(ROLLOUT, here, TEACHER, BATCH)
    assert loss.total is not None
    assert loss.total.item() == pytest.approx(VALUE, abs=5e-9)
    assert gradient(loss.total, here["student"]) == pytest.approx(GRADIENT, abs=5e-9)
    explained = S1 * THETA[1] ** 2 + THETA[2] ** 2
    assert 0 < loss.logs["explained"].item() < explained


def test_the_gradient_is_that_of_the_minimised_objective() -> None:
    """By differences, with f_psi learned anew at each; and that minimum is f_psi's own turn's."""

    def value(theta: tuple[float, ...]) -> float:
        total = METHOD.student_loss(ROLLOUT, nets(theta), TEACHER, BATCH).total
        assert total is not None
        return total.item()

    h = 1e-5
    for i, expected in enumerate(GRADIENT):
        low, high = (tuple(v + s * (i == j) for j, v in enumerate(THETA)) for s in (-h, h))
        assert (value(high) - value(low)) / (2 * h) == pytest.approx(expected, rel=1e-5)
    here = nets()
    first, second = METHOD.turns(0)
    assert (first.net, second.net) == ("fake", "student")
    learned = first.loss(here, TEACHER, BATCH).total
    assert learned is not None
    assert gradient(learned, here["fake"]) == pytest.approx([0, 0], abs=1e-15)


def test_the_teachers_coupling_is_a_fixed_point() -> None:
    """And another with the same law of x alone is not: the control."""
    for theta, still in ((STAR, True), ((MU0, 0.0, math.sqrt(S0)), False)):
        here = nets(theta)
        total = METHOD.student_loss(ROLLOUT, here, TEACHER, BATCH).total
        assert total is not None
        found = gradient(total, here["student"])
        assert (max(map(abs, found)) < 1e-14) == still
        assert still or max(map(abs, found)) > 0.01


def test_it_is_twice_sid_at_one_half() -> None:
    x, real, fake = torch.randn(3, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    difference = denoising(real, x) - denoising(fake, x)
    torch.testing.assert_close(difference, 2 * sid(x, real, fake, 0.5))


def test_a_detached_state_is_another_method() -> None:
    """The control: 0.42 off."""
    here = nets()
    with torch.no_grad():
        state = ROLLOUT(here, BATCH)
    alpha, sigma = 1 - T, math.sqrt(T * (1 - T))
    xt = alpha * state + sigma * SIGNS[:, 2:]
    x, t = ROLLOUT(here, BATCH), torch.full((8,), T, dtype=F64)
    loss = denoising(TEACHER(xt, t, END), x) - denoising(here["fake"](xt, t, END), x)
    cut = torch.tensor(gradient(loss.mean(), here["student"]))
    expected = torch.tensor(GRADIENT)
    assert float((cut - expected).norm() / expected.norm()) == pytest.approx(0.42, abs=0.01)


def test_updates_and_what_is_refused() -> None:
    assert [turn.net for turn in IBMD(FewStep(0.9, 2), ratio=2).turns(0)] == [
        *("fake", "fake", "student")
    ]
    with pytest.raises(ValueError, match=r"IBMD.ratio is 1 or more, got 0"):
        IBMD(ratio=0)
