"""Moment matching on a Gaussian, where every mean is a line: exact, with signs as noise.

The rule for a mean over three normal numbers is eight samples of +-1 each, exact for squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Ancestral, FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Loss, Nets
from fewstep.losses.weight import Power
from fewstep.methods.moment_matching import MomentMatching
from fewstep.teachers.gaussian import Gaussian

F64 = torch.float64
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)
VAR, S, T = 0.25, 0.5, 0.625
POSTERIOR = (1 - T) * VAR / ((1 - T) ** 2 * VAR + T**2)
"""E[x_0 | z_t] = POSTERIOR z_t, of data N(0, 1/4) at T on the flow path."""
WANTED = (1 - S) * VAR / ((1 - S) ** 2 * VAR + S**2)
"""E[x_0 | z_s] = 0.4 z_s."""
FIXED = 0.49076986
"""The student x = FIXED z_t whose conditional mean is WANTED z_s."""


@dataclass(frozen=True, eq=False)
class Signs(Draws):
    """s = 1/2 and t = 5/8 of the ladder, for four calls; the noises are columns of SIGNS."""

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return SIGNS[:, {"eps": 1, "posterior": 2}[purpose]].reshape(-1, *shape)

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((8,), 0.5, dtype=F64)


class Slope(nn.Module):
    """c x_t."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))
        self.path = Flow()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.c * xt


METHOD = MomentMatching(Ancestral(1.0, 4), auxiliary_weight=Power())
DATA = math.sqrt(VAR) * SIGNS[:, :1]
BATCH = Batch(torch.zeros(8, 1, dtype=F64), None, DATA, Signs(torch.arange(8)))
TEACHER = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[VAR]], dtype=F64), Flow())


def conditional(c: float) -> tuple[float, float]:
    """Slope of E[x | z_s] and variance of z_s, for the student x = c z_t."""
    m = METHOD.moment(Nets({"student": Slope(c)}), TEACHER, BATCH)
    variance = float((m.zs**2).mean())
    return float((m.x.detach() * m.zs).mean()) / variance, variance


def loss(student: float, auxiliary: float, which: str = "student", anchor: float = 1.0) -> float:
    """The gradient of a loss in its slope."""
    m = MomentMatching(METHOD.sampler, auxiliary_weight=Power(), anchor=anchor)
    nets = Nets({"student": Slope(student), "auxiliary": Slope(auxiliary)})
    found: Loss = getattr(m, f"{which}_loss")(nets, TEACHER, BATCH)
    assert found.total is not None
    (gradient,) = torch.autograd.grad(found.total, nets[which].parameters())
    return float(gradient)


def test_the_posterior_mean_as_student_is_golden() -> None:
    slope, variance = conditional(POSTERIOR)
    assert slope == pytest.approx(0.1786, abs=5e-5)
    assert variance / 0.3125 == pytest.approx(0.925, abs=5e-4)


def test_the_best_student_is_golden() -> None:
    slope, variance = conditional(FIXED)
    assert slope == pytest.approx(0.4, abs=1e-7)
    assert variance / 0.3125 == pytest.approx(1.0649, abs=5e-5)


@pytest.mark.parametrize("anchor", [0.0, 1.0, 3.0])
def test_the_auxiliary_network_is_between_student_and_teacher(anchor: float) -> None:
    slope, _ = conditional(POSTERIOR)
    optimum = (slope + anchor * WANTED) / (1 + anchor)
    assert abs(loss(POSTERIOR, optimum, "auxiliary", anchor)) < 1e-12
    assert abs(loss(POSTERIOR, optimum + 0.01, "auxiliary", anchor)) > 1e-3


def test_the_students_direction_is_the_gap_on_its_own_input() -> None:
    """d/dc of c z_t (f_aux - f_phi)(z_s): the gap's slope times E z_t z_s."""
    m = METHOD.moment(Nets({"student": Slope(0.3)}), TEACHER, BATCH)
    zt = (m.x / 0.3).detach()
    assert loss(0.3, 0.7) == pytest.approx((0.7 - WANTED) * float((zt * m.zs).mean()), rel=1e-12)
    assert loss(0.3, WANTED) == pytest.approx(0, abs=1e-12)


def test_alternation_ends_where_the_moments_match() -> None:
    """From the posterior mean, with an exact auxiliary network at each step."""
    c = POSTERIOR
    for _ in range(60):
        c -= 2 * loss(c, (conditional(c)[0] + WANTED) / 2)
    assert c == pytest.approx(FIXED, abs=1e-6)


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
def test_ancestral_states_of_noised_data_are_noised_data(path: NoisePath) -> None:
    """With x_0 itself as the guess: mean alpha_s x_0, variance sigma_s^2, and x_t between."""
    t, s = (path.time_of(torch.tensor(tau, dtype=F64)) for tau in (0.7, 0.4))
    alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    x0, noise = SIGNS[:, :1], SIGNS[:, 1:2]
    xt = alpha * x0 + sigma * noise
    xs = path.ancestral(xt, x0, SIGNS[:, 2:], t, s)
    torch.testing.assert_close((xs * x0).mean(), alpha_s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((xs**2).mean(), alpha_s**2 + sigma_s**2, rtol=1e-9, atol=1e-9)
    between = alpha / alpha_s * sigma_s**2  # Cov(x_s, x_t) given x_0
    torch.testing.assert_close((xs * sigma * noise).mean(), between, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="to an earlier s, got t < s"):
        path.ancestral(xt, x0, noise, s, t)


def test_from_pure_noise_it_forgets_the_noise() -> None:
    """alpha_t = 0: x_s = alpha_s x_0 + sigma_s eps, Diff-Instruct's noising."""
    path, one = Flow(), torch.tensor(1.0, dtype=F64)
    x0, noise, eps = SIGNS.split(1, 1)
    found = path.ancestral(noise, x0, eps, one, 0.3 * one)
    torch.testing.assert_close(found, 0.7 * x0 + 0.3 * eps)


def test_times_lead_no_further_than_a_call() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Noting(Slope):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            seen.append(t)
            return xt

    m, draws = MomentMatching(Ancestral(2.5, 4, 2.0)), Draws.range(0, 2000)
    nets = Nets({"student": Noting(0.0)})
    at = Batch(draws.normal("z", (1,), F64), None, draws.normal("x0", (1,), F64), draws)
    found = m.moment(nets, Gaussian([0.0], [[1.0]], VE()), at)
    step = (seen[0] / 2.5).sqrt() - (found.s / 2.5).sqrt()
    assert 0 <= float(step.min()) < 1e-3
    assert 0.249 < float(step.max()) < 0.2501
    assert float(seen[0].max()) == 2.5


@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=repr)
def test_shares_of_the_ladder_are_its_rungs(path: NoisePath) -> None:
    sampler = Ancestral({VE: 2.5, VP: 999.0}.get(type(path), 1.0), 5, 1.7)
    share = 1 - torch.arange(5, dtype=F64) / 5
    assert sampler.at(path, share).tolist() == pytest.approx(sampler.ladder(path))
    assert float(sampler.at(path, torch.zeros((), dtype=F64))) == path.t_min


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep(2.5, 4)}, r"MomentMatching.sampler is an Ancestral, got FewStep"),
        ({"anchor": -1.0}, r"MomentMatching.anchor is 0 or more, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentMatching(**changes)
