"""The gauges against closed forms on Gaussians, where both denoisers are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import LogitNormal, LogNormal, TimeLaw
from fewstep.eval.gauges import by_level, diversity, passed
from tests.gaussians import F64, Setting, example, fisher

COUNT, BLOCKS, LEVELS = 25_000, 8, 3
PATHS: tuple[tuple[NoisePath, TimeLaw], ...] = (
    (VE(), LogNormal(-0.5, 1.0)),
    (Flow(), LogitNormal()),
)
each_path = pytest.mark.parametrize(("path", "times"), PATHS, ids=["VE", "Flow"])


def student(setting: Setting, block: int) -> Tensor:
    """Samples a + B z."""
    draws = Draws.range(block * COUNT, COUNT, seed=5)
    return setting.a + draws.normal("z", (setting.dim,), F64) @ setting.b.T


def gauges(path: NoisePath, times: TimeLaw) -> list[list[dict[str, float]]]:
    """Independent estimates: BLOCKS x LEVELS."""
    s, out = example(1.0, path), []
    for block in range(BLOCKS):
        draws = Draws.range(block * COUNT, COUNT, seed=6)
        out.append(by_level(student(s, block), None, s.real(), s.fake(), times, draws, LEVELS))
    return out


def meets(values: list[float], exact: float) -> None:
    """The mean is within 4 standard errors of `exact`, and those are below 1 % of it."""
    found = torch.tensor(values, dtype=F64)
    error = float(found.std()) / math.sqrt(len(values))
    assert error < 0.01 * exact
    assert abs(float(found.mean()) - exact) < 4 * error


@each_path
def test_gauges_are_the_closed_forms(path: NoisePath, times: TimeLaw) -> None:
    """fisher: E |s_p - s_q|^2 / D. fake_error: the posterior variance. teacher_error: that plus
    the squared distance of both denoisers, sigma^4 / alpha^2 of the Fisher divergence."""
    quantiles = times.quantile((torch.arange(LEVELS, dtype=F64) + 0.5) / LEVELS)
    blocks = gauges(path, times)
    for level, t in enumerate(quantiles.tolist()):
        s = example(t, path)
        found = [block[level] for block in blocks]
        assert {entry["t"] for entry in found} == {t}
        divergence = float(fisher(s, s.a, s.b)) / s.dim
        cov = s.b @ s.b.T
        gain = s.alpha * cov @ torch.linalg.inv(s.p(s.a, s.b)[1])
        variance = float((cov - s.alpha * gain @ cov).trace()) / s.dim
        meets([entry["fisher"] for entry in found], divergence)
        meets([entry["fake_error"] for entry in found], variance)
        worse = variance + s.sigma**4 / s.alpha**2 * divergence
        meets([entry["teacher_error"] for entry in found], worse)
        assert worse > 1.02 * variance  # the two errors are not the same number


def test_gauges_of_a_perfect_student() -> None:
    """Fake score equal to the teacher: no divergence, equal errors; without one, neither."""
    s = example(1.0)
    x, draws = student(s, 0)[:100], Draws.range(0, 100)
    for entry in by_level(x, None, s.fake(), s.fake(), LogNormal(), draws):
        assert entry["fisher"] == 0.0
        assert entry["fake_error"] == entry["teacher_error"] > 0
    alone = by_level(x, None, s.fake(), None, LogNormal(), draws)
    assert [entry.keys() for entry in alone] == [{"t", "teacher_error"}] * 9
    assert [entry["t"] for entry in alone] == sorted(entry["t"] for entry in alone)


def test_conditions_and_samples_reach_the_denoisers() -> None:
    """The same numbers whatever else is looked at: draws belong to the samples."""
    s = example(1.0)
    x = student(s, 0)[:64]
    seen = []

    class Teacher:
        path = VE()

        def __call__(self, xt: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            seen.append((xt, cond))
            return xt

    labels = torch.arange(64)
    by_level(x, labels, Teacher(), None, LogNormal(), Draws.range(0, 64), levels=1)
    by_level(x[:8], labels[:8], Teacher(), None, LogNormal(), Draws.range(0, 8), levels=1)
    (many, all_labels), (few, few_labels) = seen
    assert torch.equal(many[:8], few)
    assert torch.equal(all_labels, labels)
    assert torch.equal(few_labels, labels[:8])


def test_diversity_by_hand() -> None:
    """Root-mean-square differences 3, 4 and 5 between three pictures of four pixels."""
    x = torch.zeros(3, 1, 2, 2, dtype=F64)
    x[1] += 3
    x[2] += torch.tensor([[4.0, 4.0], [4.0, 4.0]]) * torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert diversity(x[:2], None) == pytest.approx(3.0)
    assert diversity(x, None) == pytest.approx((3 + 4 + 5) / 3)
    assert diversity(x, torch.tensor([0, 0, 1])) == pytest.approx(3.0)
    assert diversity(x, torch.tensor([0, 1, 2])) == 0.0
    assert diversity(torch.ones(5, 4), None) == 0.0  # a collapsed student
    assert diversity(x[:1], None) == 0.0


def test_the_noise_that_passes() -> None:
    """x = m(label) + a z + b e: r^2 = a^2 / (a^2 + b^2), by labels or with one mean for all."""
    draws = Draws.range(0, 4000, seed=3)
    z, e = (draws.normal(name, (2, 3), F64) for name in "ze")
    labels = torch.arange(4000) % 4
    means = torch.randn(4, 2, 3, dtype=F64)
    assert passed(means[labels] + 0.3 * z, z, labels) == pytest.approx(1.0)
    assert passed(7 - 2 * z, z, None) == pytest.approx(1.0)
    assert passed(torch.ones(4000, 2, 3), z, labels) == 0.0  # nothing differs at all
    mixed = passed(means[labels] + 0.3 * z + 0.4 * e, z, labels)
    assert mixed == pytest.approx(0.36, abs=0.02)  # 0.09 / 0.25
    assert passed(e, z, labels) < 1e-3
    assert passed(z.flip(0), z, labels) < 1e-3  # another sample's noise is none of its own


def test_diversity_of_a_gaussian() -> None:
    """E |x - y| for x, y ~ N(0, I_4): sqrt 2 E chi_4 = sqrt 2 * 1.8800; divided by sqrt 4.

    Over 20 sets of 200; the mean within 4 standard errors, which are below 1 %.
    """
    draws = Draws.range(0, 4000, seed=1).normal("x", (4,), F64)
    exact = math.sqrt(2) * math.sqrt(2) * math.gamma(2.5) / math.gamma(2) / 2
    meets([diversity(part, None) for part in draws.split(200)], exact)
    spread = [diversity(2 * part + 7, None) for part in draws.split(200)]
    meets(spread, 2 * exact)
