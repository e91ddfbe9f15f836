"""TDM on a Gaussian, exactly: two signs in place of z and eps make every mean of squares.

Data N(0, 1/4) on the flow path, a first call from t = 1 to s = 1/2, states noised to t = 3/4. The
exact flow map predicts x = SD z there, and x_s has the standard deviation of data at s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, TimeLaw, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.tdm import TDM
from fewstep.teachers.gaussian import Gaussian
from tests.gaussians import GaussianFlowMap

F64 = torch.float64
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 2)
TRUE = 0.25 * 0.25 / (0.25**2 * 0.25 + 0.75**2)
"""Slope of E[x_0 | x_t] of the data at t = 3/4: 0.10810811."""
SD = (math.sqrt(0.3125) - 0.5) / 0.5
"""The flow map's prediction at t = 1: 0.11803399 z, so that x_s is 0.55901699 z."""
TEACHER = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), Flow())
GOLDEN = {"subinterval": 0.10810811, "sample": 0.05706638}
ENDS = {"subinterval": 0.559017, "sample": 0.605622}
each_target = pytest.mark.parametrize("target", GOLDEN)


@dataclass(frozen=True, eq=False)
class Signs(Draws):
    """eps is the second column of SIGNS, every share 1/2."""

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return SIGNS[:, 1:]

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((4,), 0.5, dtype=F64)


class Slope(nn.Module):
    """c x_t."""

    def __init__(self, c: float, path: NoisePath = Flow()) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.c * xt


BATCH = Batch(SIGNS[:, :1], None, None, Signs(torch.arange(4)))


def method(target: str = "subinterval", times: TimeLaw = Discrete((0.75,)), **more: Any) -> TDM:
    plain = {"weight": Power(), "fake_weight": Power(), **more}
    return TDM(FewStep(1.0, 2, "ddim"), times, target=target, **plain)  # type: ignore[arg-type]


def gradient(m: TDM, student: float, fake: float, which: str) -> float:
    nets = Nets({"student": Slope(student), "fake": Slope(fake)})
    found = getattr(m, f"{which}_loss")(Rollout(m.sampler, 1), nets, TEACHER, BATCH)
    return float(torch.autograd.grad(found.total, nets[which].parameters())[0])


def learned(m: TDM, student: float) -> float:
    """The slope that the fake score ends with: its gradient is a line."""
    at, further = (gradient(m, student, c, "fake") for c in (0.0, 1.0))
    return at / (at - further)


@each_target
def test_what_the_fake_score_learns_at_the_exact_flow_map(target: str) -> None:
    assert learned(method(target), SD) == pytest.approx(GOLDEN[target], abs=1e-8)


def test_the_exact_flow_map_is_a_fixed_point() -> None:
    """And with x for a target it is not: the control."""
    for target, still in (("subinterval", True), ("sample", False)):
        m = method(target)
        push = gradient(m, SD, learned(m, SD), "student")
        assert (abs(push) < 1e-12) == still
        assert still or abs(push) > 0.01


@each_target
def test_where_the_student_ends(target: str) -> None:
    """The spread of x_s: that of the data at s, or too wide."""
    m = method(target)

    def push(spread: float) -> float:
        c = 2 * spread - 1
        return gradient(m, c, learned(m, c), "student")

    end = ENDS[target]
    assert abs(push(end)) < 1e-5
    assert push(end - 0.01) < -1e-4
    assert push(end + 0.01) > 1e-4


def test_the_direction_of_the_student() -> None:
    """d/dc of c z (f_psi - f_phi)(x_t) at x_t = r x_s + tau eps, by hand."""
    c, fake = 0.4, 0.3
    found = gradient(method(), c, fake, "student")
    assert found == pytest.approx((fake - TRUE) * 0.5 * (0.5 * c + 0.5), rel=1e-12)


def test_huber_bounds_the_direction() -> None:
    bounded = gradient(method(huber=1e-9), 0.4, 0.3, "student")
    xt = 0.5 * 0.7 * SIGNS[:, 0] + math.sqrt(0.75**2 - 0.25**2) * SIGNS[:, 1]
    assert bounded == pytest.approx(float((SIGNS[:, 0] * xt.sign()).mean()), abs=1e-6)
    wide = gradient(method(huber=1e3), 0.4, 0.3, "student")
    assert 1e3 * wide == pytest.approx(gradient(method(), 0.4, 0.3, "student"), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_levels_are_between_the_state_and_its_call(k: int) -> None:
    m = TDM(FewStep(1.0, 4, "ddim"), Uniform(0.01, 1.0))
    draws = Draws.range(0, 500)
    at = Batch(draws.normal("z", (1,), F64), None, None, draws)
    rollout = Rollout(m.sampler, k)
    state = rollout.state(Nets({"student": Slope(0.2)}), at)
    n = m.noised(rollout, state, at).noised
    low, high = max(0.01, 1 - k / 4), 1 - (k - 1) / 4
    assert low <= float(n.t.min()) < low + 0.01
    assert high - 0.01 < float(n.t.max()) <= high


def test_the_last_state_is_data_on_timesteps_too() -> None:
    """Timestep 0 still carries noise, the sample does not."""
    m, path, draws = TDM(FewStep(999.0, 2, "ddim"), Uniform(1.0, 999.0)), VP(), Draws.range(0, 50)
    at, rollout = Batch(draws.normal("z", (1,), F64), None, None, draws), Rollout(m.sampler, 2)
    state = rollout.state(Nets({"student": Slope(0.2, path)}), at)
    n = m.noised(rollout, state, at).noised
    expected = n.alpha * state.x0 + n.sigma * draws.normal("eps", (1,)).double()
    torch.testing.assert_close(n.xt, expected, rtol=1e-9, atol=1e-9)


def test_states_of_the_exact_flow_map_have_the_laws_of_data() -> None:
    """All calls, with the map of the closed form: no direction but that of samples, which is 0."""
    flow_map = GaussianFlowMap(TEACHER)

    class Student(nn.Module):
        path = Flow()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            out: Tensor = flow_map(xt, t, s=t - 0.5)
            return out

    for state in FewStep(1.0, 2, "ddim").states(Student(), BATCH.z, None, BATCH.draws):
        s = float(state.s[0])
        spread = (1 - s) ** 2 * 0.25 + s**2
        assert float((state.xs**2).mean()) == pytest.approx(spread, rel=1e-12)


def test_the_order_and_the_rate_of_updates() -> None:
    turns = TDM(ratio=2, fake_rate=5.0).turns(3)
    assert [(turn.net, turn.rate) for turn in turns] == [("fake", 5), ("fake", 5), ("student", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep(2.5, 4)}, r"TDM.sampler is a FewStep\(noise='ddim'\), got"),
        ({"target": "x0"}, r"TDM.target is 'sample' or 'subinterval', got 'x0'"),
        ({"ratio": 0}, "TDM.ratio is 1 or more, got 0"),
        ({"huber": -1.0}, "huber >= 0"),
        ({"fake_rate": 0.0}, "fake_rate > 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TDM(**changes)
