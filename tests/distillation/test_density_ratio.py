"""The density ratio: its statistics, its clip, and the gradient that the scores give it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, coefficients
from fewstep.distillation.density_ratio import (
    LARGEST,
    RatioStatistics,
    along_scores,
    follow,
    read_ratio,
    require_ratio,
    with_statistics,
)
from fewstep.distillation.fake_score import NoisedSamples, Predictions
from fewstep.distillation.method import Nets, Step
from fewstep.teachers.gaussian import Gaussian

F64 = torch.float64


def test_statistics_are_those_of_the_step_and_keep_what_they_did_not_see() -> None:
    s = RatioStatistics(3)
    count, ratio = torch.tensor([2.0, 0.0, 4.0]), torch.tensor([6.0, 0.0, 2.0])
    s.follow(count, ratio, torch.tensor(9.0), 0.0)
    assert s.ratio.tolist() == [3.0, 1.0, 0.5]
    assert float(s.h) == 1.5
    s.follow(count, ratio, torch.tensor(3.0), 0.5)
    assert s.ratio.tolist() == [3.0, 1.0, 0.5]
    assert float(s.h) == 1.0


def test_the_ratio_is_divided_by_the_mean_of_its_level_then_clipped() -> None:
    s = RatioStatistics(2).double()
    s.ratio.copy_(torch.tensor([2.0, 0.5]))
    log_ratio = torch.tensor([4.0, 1.0, 1.0, 9.0], dtype=F64).log()
    u = torch.tensor([0.1, 0.49, 0.51, 0.999], dtype=F64)
    r = read_ratio(s, log_ratio, u, (0.6, 3.0))
    torch.testing.assert_close(r.said, log_ratio.exp())
    assert r.level.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(r.kept, torch.tensor([2.0, 0.6, 2.0, 3.0], dtype=F64))
    assert float(r.clipped) == 0.5
    sums = r.sums(2, 3 * r.kept)
    assert sums["count"].tolist() == [2.0, 2.0]
    assert sums["ratio"].tolist() == pytest.approx([5.0, 10.0])
    assert float(sums["h"]) == pytest.approx(22.8)
    assert float(r.logs["ratio"]) == pytest.approx(3.75)


def test_the_ratio_has_a_gradient_within_its_bounds_alone() -> None:
    s = RatioStatistics(1).double()
    said = torch.tensor([0.5, 2.0, -3.0, 2 * LARGEST], dtype=F64, requires_grad=True)
    r = read_ratio(s, said, torch.full((4,), 0.5, dtype=F64), (0.1, 5.0))
    (slope,) = torch.autograd.grad(r.kept.sum(), said)
    assert slope.tolist() == pytest.approx([float(torch.tensor(0.5).exp()), 0, 0, 0])
    assert float(r.said.detach().max()) == pytest.approx(22026.4658)  # exp(10)


def test_statistics_follow_a_step_that_says_something() -> None:
    nets = Nets({"statistics": RatioStatistics(1)})
    sums = {"count": torch.tensor([4.0]), "ratio": torch.tensor([2.0]), "h": torch.tensor(8.0)}
    follow(Step(nets, nn.Identity(), 0, 0, 4, {}), 0.0)
    assert nets["statistics"].ratio.item() == 1.0
    follow(Step(nets, nn.Identity(), 0, 0, 4, sums), 0.0)
    assert nets["statistics"].ratio.item() == 0.5
    assert nets["statistics"].h.item() == 2.0


def test_statistics_are_one_more_net_and_settings_of_no_ratio_are_refused() -> None:
    nets = with_statistics(Nets({"student": nn.Linear(1, 1)}), 3)
    assert nets["statistics"].ratio.tolist() == [1, 1, 1]
    require_ratio(nets, (0.5, 0.5), 1, 0.0)
    for clip, bins, rate in (
        *(((0.0, 1.0), 1, 0.0), ((2.0, 1.0), 1, 0.0), ((0.5, 2.0), 0, 0.0)),
        *(((0.5, 2.0), 1, 1.0), ((0.5, 2.0), 1, -0.1), ((0.5, 2.0), 1, math.nan)),
    ):
        with pytest.raises(ValueError, match=r"^ModuleDict needs a clip of two increasing"):
            require_ratio(nets, clip, bins, rate)


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
def test_the_scores_have_the_gradient_of_the_exact_ratio(path: NoisePath) -> None:
    """Of two Gaussians, whatever the discriminator's own gradient is; the value is its own."""
    real, fake = (
        Gaussian(torch.tensor(mean, dtype=F64), torch.tensor(covariance, dtype=F64), path)
        for mean, covariance in (
            ([0.4, -0.7], [[0.5, 0.2], [0.2, 0.3]]),
            ([-0.3, 0.1], [[0.2, -0.1], [-0.1, 0.4]]),
        )
    )
    t = path.time_of(torch.tensor([0.3, 0.6, 0.8], dtype=F64))
    xt = torch.tensor([[0.2, 1.0], [-0.4, 0.3], [0.9, -1.1]], dtype=F64, requires_grad=True)
    alpha, sigma = coefficients(path, xt, t)
    n = NoisedSamples(xt, t, alpha, sigma)
    p = Predictions(real(xt, t), fake(xt, t), fake(xt, t), alpha, sigma, torch.ones_like(alpha))
    exact = real.log_prob(xt, t) - fake.log_prob(xt, t)
    (expected,) = torch.autograd.grad(exact.sum(), xt, retain_graph=True)
    said = 3 * exact + xt.sum(1)
    found = along_scores(said, n, p, math.inf)
    assert torch.equal(found, said)
    (slope,) = torch.autograd.grad(found.sum(), xt)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)
    (bounded,) = torch.autograd.grad(along_scores(said, n, p, 1.5).sum(), xt)
    lengths = (expected * (alpha**2 + sigma**2).sqrt()).norm(dim=1)
    assert lengths.min() < 1.5 < lengths.max()
    longest = (1.5 / lengths).clamp(max=1)[:, None]
    torch.testing.assert_close(bounded, longest * expected, rtol=1e-9, atol=1e-9)
