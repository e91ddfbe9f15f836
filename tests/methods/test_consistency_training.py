"""Consistency training: published schedule, and its fixed point on a Gaussian in expectation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, LogNormal
from fewstep.distillation.flow_maps import level
from fewstep.distillation.method import Nets
from fewstep.losses.distance import PseudoHuber, SquaredL2, rms_distance
from fewstep.losses.weight import Power
from fewstep.methods.consistency_training import ConsistencyTraining
from tests import quadrature
from tests.instances import PATHS
from tests.quadrature import F64

LAM = 0.25


@pytest.mark.parametrize(
    ("t", "q", "stage", "r"),
    [
        *((10.0, 2.0, 0, 4.9981841), (1.0, 2.0, 0, 0.0)),
        *((1.0, 2.0, 3, 0.80302929), (0.3, 2.0, 7, 0.29483852)),
    ],
)
def test_golden_levels_of_the_schedule(t: float, q: float, stage: int, r: float) -> None:
    m = ConsistencyTraining(q=q)
    found = t - m.gap(torch.tensor(t, dtype=F64), stage).item()
    assert found == pytest.approx(r, rel=1e-7)


def test_the_gap_closes_stage_by_stage() -> None:
    """A pure function of the step, whose last stage goes on; by q each time."""
    m = ConsistencyTraining(q=4.0, stages=3, stage_steps=10)
    assert [m.stage(step) for step in (0, 9, 10, 19, 20, 29, 30, 1000)] == [0, 0, 1, 1, 2, 2, 2, 2]
    t = torch.tensor([0.5, 5.0, 50.0], dtype=F64)
    gaps = [m.gap(t, stage) for stage in range(3)]
    torch.testing.assert_close(gaps[1] / gaps[2], torch.full_like(t, 4.0))
    assert bool((gaps[0] <= t).all())
    (turn,) = m.turns(25)
    assert turn.loss.args == (2,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_levels_are_those_of_edm_on_every_path(path: NoisePath) -> None:
    """sigma / alpha of t and r, up to the sampler's start, and never a gap of nothing."""
    start = {3.0: 3.0, 999.0: 900.0}.get(path.t_max, 0.9 * path.t_max)
    m = ConsistencyTraining(FewStep(start))
    levels = LogNormal(-1.1, 2.0).quantile((torch.arange(500, dtype=F64) + 0.5) / 500)
    t, r, gap, known = m.pair(path, levels, 2)
    assert bool((t <= start).all())
    assert bool((r <= t).all())
    assert bool((gap > 0).all())
    inside = ~known & (t < start)
    assert bool((r[known] <= path.t_min + 1e-6).all())
    assert int(inside.sum()) > 10
    torch.testing.assert_close(level(path, t)[inside], levels[inside], rtol=1e-6, atol=0)
    apart = level(path, t) - level(path, r)
    torch.testing.assert_close(apart[inside], gap[inside], rtol=1e-5, atol=1e-9)


class Two(nn.Module):
    """g = c x_t at the upper time, with a free number c, and b x_t at any other."""

    def __init__(self, path: NoisePath, upper: float, c: float, b: float) -> None:
        super().__init__()
        self.path, self.upper, self.b = path, upper, b
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.where(t[:, None] == self.upper, self.c, self.b) * xt


@pytest.mark.parametrize(
    "case", [(VE(), 2.0), (Flow(), 0.7), (TrigFlow(), 1.1)], ids=lambda case: repr(case[0])
)
def test_the_mean_gradient_is_zero_at_a_step_of_euler(case: tuple[NoisePath, float]) -> None:
    """c / b is the teacher's DDIM step from t to r; the loss at it is not zero."""
    path, upper = case
    t = torch.tensor([upper], dtype=F64)
    high = level(path, t).item()
    m = ConsistencyTraining(FewStep(upper), Discrete((2 * high,)), stages=4, distance=SquaredL2())
    batch = quadrature.batch(200)
    batch = batch._replace(x0=0.5 * batch.z)
    t, r, gap, _ = m.pair(path, torch.tensor([2 * high], dtype=F64), 3)
    assert t.item() == upper
    gain = path.alpha(t) * LAM / (path.alpha(t) ** 2 * LAM + path.sigma(t) ** 2)
    euler = path.ddim(torch.ones(1, 1, dtype=F64), gain[:, None], t, r).item()

    def found(c: float) -> tuple[float, float]:
        net = Two(path, upper, c, 0.6)
        total = m.student_loss(3, Nets({"student": net}), net, batch).total
        assert total is not None
        (gradient,) = torch.autograd.grad(total, net.c)
        return total.item(), gradient.item()

    loss, slope = found(0.6 * euler)
    s2, q2 = ((path.alpha(v) ** 2 * LAM + path.sigma(v) ** 2).item() for v in (t, r))
    cross = (path.alpha(t) * path.alpha(r) * LAM + path.sigma(t) * path.sigma(r)).item()
    floor = 0.36 * (euler**2 * s2 - 2 * euler * cross + q2) / gap.item()
    assert slope == pytest.approx(0, abs=1e-9)
    assert loss == pytest.approx(floor, rel=1e-6)
    assert floor > 1e-4
    exact = 0.6 * math.sqrt(q2 / s2)
    assert abs(found(exact)[1]) > 5e-4  # the flow itself is not the fixed point


def test_the_target_is_the_datum_where_r_is_zero() -> None:
    """At stage 0 and t = 1, whatever the network says there; with iCT's distance and weight."""
    path, m = VE(), ConsistencyTraining(FewStep(1.0), Discrete((1.0,)), weight=Power(0, 1, 3.0))
    draws = Draws.range(0, 20)
    x0 = draws.normal("x0", (4,), F64)
    batch = quadrature.batch(2)._replace(x0=x0, draws=draws)
    net = Two(path, 1.0, 0.3, math.nan)
    apart = 0.3 * perturb(path, x0, draws.normal("eps", (4,)).double(), torch.ones(20)) - x0
    by_hand = ((apart**2).mean(1) + 0.00054**2).sqrt() - 0.00054
    found = m.student_loss(0, Nets({"student": net}), net, batch)
    torch.testing.assert_close(found.total, 3 * by_hand.mean())
    torch.testing.assert_close(found.logs["error"], (apart**2).mean())
    later = m.student_loss(3, Nets({"student": net}), net, batch).total
    assert later is not None
    assert later.isnan()  # there the network's own answer is the target


def test_ict_has_a_constant_for_every_size() -> None:
    """0.00054 D^(1/2) of the norm: 0.0299 for 3 x 32 x 32."""
    y = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    c = 0.00054 * math.sqrt(3072)
    assert c == pytest.approx(0.0299298, rel=1e-5)
    published = (y.flatten(1).square().sum(1) + c**2).sqrt() - c
    found = rms_distance(PseudoHuber(0.00054), y)
    torch.testing.assert_close(found * math.sqrt(3072), published)


@pytest.mark.parametrize("settings", [{"q": 1.0}, {"stages": 0}, {"stage_steps": 0}, {"k": -1.0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="q > 1, k >= 0, b >= 0"):
        ConsistencyTraining(**settings)
