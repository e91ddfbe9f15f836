"""f-distill follows the gradient of its f-divergence, with the ratio that a logit says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.density_ratio import RatioStatistics
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.losses.f_divergence import DIVERGENCES, f_divergence
from fewstep.losses.weight import Power
from fewstep.methods.f_distill import FDistill
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line, batch

MU, VAR, A, B, SIGMA = 0.6, 0.3, -0.2, 0.7, 0.8
each_family = pytest.mark.parametrize("family", DIVERGENCES)


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), VE())


def log_density(x: Tensor, mean: Any, variance: Any) -> Tensor:
    out: Tensor = -((x - mean) ** 2) / variance / 2 - torch.as_tensor(variance).log() / 2
    return out


def log_ratio(x: Tensor, sigma: float, a: Any = A, b: Any = B) -> Tensor:
    """log q_t / p_t at noise level sigma."""
    real = log_density(x, MU, torch.tensor(VAR + sigma**2, dtype=F64))
    return real - log_density(x, a, torch.as_tensor(b**2 + sigma**2))


class Judge(nn.Module):
    """The exact fake score of the student, whose encoder says log r times `sign` plus `off`."""

    def __init__(self, sign: float = 1.0, off: float = 0.0, at: float | None = None) -> None:
        super().__init__()
        self.score, self.path = gaussian(A, B**2), VE()
        self.sign, self.off, self.at = sign, off, at

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.score(xt, t)

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        sigma = float(t[0]) if self.at is None else self.at
        return self.sign * log_ratio(xt, sigma) + self.off

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self(xt, t), self.encode(xt, t)


def method(family: str, **changes: Any) -> FDistill:
    settings: dict[str, Any] = {"weight": Power(2, -2), "gan": 0.0, "clip": (1e-9, 1e9)}
    settings |= {"times": Discrete((SIGMA,)), "bins": 1, "sampler": FewStep(1.0)}
    return FDistill(family=family, **settings | changes)  # type: ignore[arg-type]


def loss(
    m: FDistill, judge: Judge, statistics: RatioStatistics | None = None
) -> tuple[Loss, Line]:
    student = Line(A, B)
    nets = Nets({"student": student, "fake": judge})
    nets["statistics"] = statistics or RatioStatistics(m.bins).double()
    rollout = Rollout(m.sampler, 1)
    return m.student_loss(rollout, nets, gaussian(MU, VAR), batch(400)), student


def gradient(m: FDistill, judge: Judge, statistics: RatioStatistics | None = None) -> Tensor:
    found, student = loss(m, judge, statistics)
    assert found.total is not None
    return student.gradient(found.total)


def reference(family: str) -> Tensor:
    """d/d(a, b) of D_f(q_t || p_t), by quadrature on a grid of x."""
    x = torch.linspace(-14, 14, 20_001, dtype=F64)
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (A, B))
    p = log_density(x, a, b**2 + SIGMA**2)
    r = log_ratio(x, SIGMA, a, b).exp()
    density = p.exp() / torch.pi**0.5 / 2**0.5
    total = torch.trapezoid(density * f_divergence(family).f(r), x)
    return torch.stack(torch.autograd.grad(total, [a, b]))


def miss(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@each_family
def test_the_direction_is_the_gradient_of_the_divergence(family: str) -> None:
    assert miss(gradient(method(family), Judge()), reference(family)) < 0.02


@pytest.mark.parametrize("family", ["kl", "js", "softened", "hellinger", "jeffreys", "pearson"])
def test_a_ratio_that_is_wrong_shows(family: str) -> None:
    """The logit's sign turned; read at another noise level; another family's h."""
    expected = reference(family)
    assert miss(gradient(method(family), Judge(sign=-1.0)), expected) > 0.1
    assert miss(gradient(method(family), Judge(at=2.5 * SIGMA)), expected) > 0.05
    assert miss(gradient(method("reverse_kl"), Judge()), expected) > 0.1


def test_a_logit_off_by_a_constant_changes_nothing_after_two_steps() -> None:
    """E_p r = 1 at each level: the mean takes the constant out of r, then out of the mean of h."""
    m = method("js", bins=4)
    rows = []
    for off in (0.0, 1.0986122886681098):
        judge, statistics = Judge(off=off), RatioStatistics(m.bins).double()
        before = gradient(m, judge, statistics)
        for step in range(2):
            found, student = loss(m, judge, statistics)
            nets = Nets({"student": student, "fake": judge, "statistics": statistics})
            m.after_step(Step(nets, student, step, 0, 4, found.sums))
        mean = float(found.logs["ratio"]) / float(torch.tensor(off).exp())
        assert abs(mean - 1) < 2e-3  # E_p r = 1
        rows.append((before, gradient(m, judge, statistics)))
    (first, then), (raw, normalised) = rows
    assert miss(raw, first) > 0.3
    assert miss(normalised, then) < 1e-6


def test_a_loss_changes_no_statistics() -> None:
    """They are those of the step before, for all parts of a batch alike."""
    m, statistics = method("kl"), RatioStatistics(1).double()
    first, second = (gradient(m, Judge(off=0.5), statistics) for _ in range(2))
    assert torch.equal(first, second)
    assert statistics.ratio.item() == statistics.h.item() == 1


def test_levels_have_equal_mass() -> None:
    """A level is a tenth of the draws of t, whatever the law of t."""
    m = FDistill(times=LogNormal(), bins=10, fake=FDistill().fake)
    student = Line(A, B)
    nets = Nets({"student": student, "fake": Judge()})
    nets["statistics"] = RatioStatistics(10).double()
    draws = Draws.range(0, 4000)
    found = m.student_loss(
        Rollout(m.sampler, 1),
        nets,
        gaussian(MU, VAR),
        Batch(draws.normal("z", (1,), F64), None, None, draws),
    )
    assert float(found.sums["count"].sum()) == 4000
    assert float(found.sums["count"].min()) > 320


def test_the_clip_acts_on_the_normalised_ratio_and_is_logged() -> None:
    found, _ = loss(method("kl", clip=(0.5, 2.0)), Judge())
    share = float(found.logs["clipped"])
    assert 0.2 < share < 0.9
    lowered = RatioStatistics(1).double()
    lowered.ratio.fill_(100.0)
    assert float(loss(method("kl", clip=(0.5, 2.0)), Judge(), lowered)[0].logs["clipped"]) > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "rkl"}, "or 'pearson', got 'rkl'"),
        ({"bins": 0}, "bins >= 1"),
        ({"rate": 1.0}, "rate < 1"),
        ({"clip": (2.0, 1.0)}, "increasing"),
        ({"gan": -1.0}, "gan is 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FDistill(**changes)
