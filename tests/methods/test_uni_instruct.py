"""Uni-Instruct follows the gradient of an expanded divergence, its ratio differentiated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation import density_ratio
from fewstep.distillation.critic import Critic
from fewstep.distillation.density_ratio import RatioStatistics
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.losses.f_divergence import DIVERGENCES, f_divergence
from fewstep.losses.weight import Power
from fewstep.methods import uni_instruct
from fewstep.methods.sid import SiD
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line, Rule, hermite

MU, VAR, A, B, SIGMA = 1.5, 0.3, -1.0, 0.6, 0.5
"""The golden case, whose ratios are far from 1: log r is -9 in the mean, and 2 at most."""
AT, ROWS = hermite(B, SIGMA)
LARGEST = density_ratio.LARGEST
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.fixture(autouse=True)
def _logits_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is cut off of the exact integrals."""
    monkeypatch.setattr(density_ratio, "LARGEST", 300.0)


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
    """The exact fake score of the student, whose encoder says log r times `sign` plus `off`.

    What it says has no gradient: the loss must not want one.
    """

    def __init__(self, sign: float = 1.0, off: float = 0.0, at: float = SIGMA) -> None:
        super().__init__()
        self.score, self.path = gaussian(A, B**2), VE()
        self.sign, self.off, self.at = sign, off, at

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.score(xt, t)

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return (self.sign * log_ratio(xt, self.at) + self.off).detach()

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self(xt, t), self.encode(xt, t)


def method(divergence: str, **changes: Any) -> UniInstruct:
    settings: dict[str, Any] = {
        "weight": Rule(ROWS, Power(2, -4)),
        "gan": 0.0,
        "clip": (1e-300, 1e300),
        "slope": math.inf,
    }
    settings |= {"times": Discrete((SIGMA,)), "bins": 1, "sampler": FewStep(1.0)}
    return UniInstruct(divergence=divergence, **settings | changes)  # type: ignore[arg-type]


def loss(
    m: UniInstruct, judge: Judge, statistics: RatioStatistics | None = None
) -> tuple[Loss, Line]:
    student = Line(A, B)
    nets = Nets({"student": student, "fake": judge})
    nets["statistics"] = statistics or RatioStatistics(m.bins).double()
    return m.student_loss(Rollout(m.sampler, 1), nets, gaussian(MU, VAR), AT), student


def gradient(m: UniInstruct, judge: Judge, statistics: RatioStatistics | None = None) -> Tensor:
    found, student = loss(m, judge, statistics)
    assert found.total is not None
    return student.gradient(found.total)


def reference(divergence: str) -> Tensor:
    """d/d(a, b) of 1/2 E_p[h(r) |s_p - s_q|^2], in which all moves with the student."""
    x = torch.linspace(-25, 25, 20_001, dtype=F64)
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (A, B))
    variance = b**2 + SIGMA**2
    density = log_density(x, a, variance).exp() / (2 * torch.pi) ** 0.5
    u = (a - x) / variance - (MU - x) / (VAR + SIGMA**2)
    h = f_divergence(divergence).h(log_ratio(x, SIGMA, a, b).exp())
    total = torch.trapezoid(density * h * u**2, x) / 2
    return torch.stack(torch.autograd.grad(total, [a, b]))


def miss(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@each_divergence
def test_the_gradient_is_that_of_the_expanded_divergence(divergence: str) -> None:
    assert miss(gradient(method(divergence), Judge()), reference(divergence)) < 1e-5


GOLDEN = {
    "kl": (-13.437248, -65.450412),
    "reverse_kl": (-16.528926, 0.74200262),
    "js": (0.726651, -0.46250316),
    "hellinger": (0.67265043, -1.5998466),
}
"""d/d(a, b) of E_p[h |u|^2], by another program."""


@pytest.mark.parametrize("divergence", GOLDEN)
def test_golden_gradients(divergence: str) -> None:
    found = 2 * gradient(method(divergence), Judge())
    assert found.tolist() == pytest.approx(GOLDEN[divergence], rel=1e-5)


DIFFERENTIABLE = [name for name in DIVERGENCES if name != "reverse_kl"]


@pytest.mark.parametrize("divergence", DIFFERENTIABLE)
def test_a_ratio_without_gradient_is_another_method(
    divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        uni_instruct, "along_scores", lambda log_ratio, n, p, most: log_ratio.detach()
    )
    assert miss(gradient(method(divergence), Judge()), reference(divergence)) > 0.05


@pytest.mark.parametrize("divergence", DIFFERENTIABLE)
def test_a_ratio_that_is_wrong_shows(divergence: str) -> None:
    """The logit's sign turned; read at another noise level; the reverse KL taken for it."""
    expected = reference(divergence)
    assert miss(gradient(method(divergence), Judge(sign=-1.0)), expected) > 0.1
    assert miss(gradient(method(divergence), Judge(at=2.5 * SIGMA)), expected) > 0.05
    assert miss(gradient(method("reverse_kl"), Judge()), expected) > 0.04


@pytest.mark.parametrize(("divergence", "alpha"), [("reverse_kl", 0.5), ("kl", 1.0)])
def test_it_is_sid_times_h(divergence: str, alpha: float) -> None:
    """Of the reverse KL at alpha = 1/2; of KL at alpha = 1 where the ratio stands at 1."""
    m = method(divergence, clip=(1.0, 1.0))
    sid = SiD(m.sampler, alpha=alpha, times=m.times, weight=m.weight)
    student, judge = Line(A, B), Judge()
    nets = Nets({"student": student, "fake": judge})
    rollout = Rollout(m.sampler, 1)
    expected = sid.student_loss(rollout, nets, gaussian(MU, VAR), AT).total
    early = loss(method(divergence), judge)
    torch.testing.assert_close(gradient(m, judge), student.gradient(expected))
    assert early[1].gradient(early[0].total).allclose(student.gradient(expected)) == (alpha < 1)


def test_before_the_divergence_it_is_sid_at_one() -> None:
    m = method("kl", student_from=2, divergence_from=4)
    sid = SiD(m.sampler, alpha=1.0, times=m.times, weight=m.weight)
    assert [len(m.turns(step)) for step in range(6)] == [1, 1, 2, 2, 2, 2]
    student = Line(A, B)
    nets = Nets({"student": student, "fake": Judge(), "statistics": RatioStatistics(1).double()})
    for step in range(2, 6):
        totals = [one.turns(step)[1].loss(nets, gaussian(MU, VAR), AT).total for one in (m, sid)]
        assert torch.equal(totals[0], totals[1]) == (step < 4)


def test_a_logit_off_by_a_constant_changes_nothing_after_two_steps() -> None:
    """The mean of r at its level takes the constant out, then the mean of h is of that r."""
    m = method("js", rate=0.0)
    rows = []
    for off in (0.0, 1.0986122886681098):
        judge, statistics = Judge(off=off), RatioStatistics(m.bins).double()
        before = gradient(m, judge, statistics)
        for step in range(2):
            found, student = loss(m, judge, statistics)
            nets = Nets({"student": student, "fake": judge, "statistics": statistics})
            m.after_step(Step(nets, student, step, 0, 4, found.sums))
        rows.append((before, gradient(m, judge, statistics)))
    (first, then), (raw, normalised) = rows
    assert miss(raw, first) > 0.3
    assert miss(normalised, then) < 1e-6


def test_the_scale_is_that_of_h() -> None:
    """The mean of h divides the loss, so that its size is that of the reverse KL's."""
    assert float(loss(method("js"), Judge(sign=0.0))[0].sums["h"]) == pytest.approx(len(ROWS) / 2)
    statistics = RatioStatistics(1).double()
    statistics.h.fill_(4.0)
    halved = gradient(method("kl"), Judge(), statistics)
    torch.testing.assert_close(4 * halved, gradient(method("kl"), Judge()))


def test_terms_are_added_and_logged_apart() -> None:
    plain, _ = loss(method("kl"), Judge())
    total, logs, _ = loss(method("kl", gan=0.5, gan_weight=Power(scale=3.0)), Judge())[0]
    assert set(logs) == {"score", "gan_loss", "ratio", "clipped"}
    torch.testing.assert_close(plain.total, logs["score"])
    torch.testing.assert_close(total, logs["score"] + 1.5 * logs["gan_loss"])


def test_levels_are_read_from_the_times_of_the_loss() -> None:
    m = UniInstruct(times=Discrete((0.3, 0.6)), bins=2, sampler=FewStep(1.0))
    nets = Nets({"student": Line(A, B), "fake": Judge()})
    nets["statistics"] = RatioStatistics(2).double()
    draws = Draws.range(0, 1000)
    at = Batch(draws.normal("z", (1,), F64), None, None, draws)
    found = m.student_loss(Rollout(m.sampler, 1), nets, gaussian(MU, VAR), at)
    upper = float((draws.uniform("t") > 0.5).sum())
    assert found.sums["count"].tolist() == [1000 - upper, upper]


def test_the_largest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(10) at most, and no gradient of r beyond."""
    monkeypatch.setattr(density_ratio, "LARGEST", LARGEST)
    found, _ = loss(method("kl"), Judge(sign=0.0, off=25.0))
    assert float(found.logs["ratio"]) == pytest.approx(22026.4658)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "rkl"}, "or 'pearson', got 'rkl'"),
        ({"bins": 0}, "bins >= 1"),
        ({"rate": 1.0}, "rate < 1"),
        ({"clip": (2.0, 1.0)}, "increasing"),
        ({"gan": -1.0}, "0 or more"),
        ({"divergence_from": -1}, "0 or more"),
        ({"fake": Critic(loss="hinge")}, "do not tell the density ratio"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniInstruct(**changes)
