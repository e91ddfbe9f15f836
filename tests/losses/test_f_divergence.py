"""h = r^2 f'' for every family, and f(1) = 0, f convex: from f alone."""

from __future__ import annotations

import pytest
import torch

from fewstep.losses.f_divergence import DIVERGENCES, expanded, f_divergence
from tests import gaussians as closed

each_family = pytest.mark.parametrize("family", DIVERGENCES)


@each_family
def test_h_is_the_second_derivative_of_f_times_r_squared(family: str) -> None:
    f, h, _ = f_divergence(family)
    r = torch.logspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(h(r.detach()), r.detach() ** 2 * curve, rtol=1e-9, atol=1e-12)
    assert float(f(torch.ones((), dtype=torch.float64)).abs()) < 1e-15
    assert bool((h(r.detach()) > 0).all())


@each_family
def test_the_slope_is_the_derivative_of_h(family: str) -> None:
    _, h, slope = f_divergence(family)
    r = torch.logspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    value = h(r)
    expected = torch.zeros_like(r)
    if value.requires_grad:
        (expected,) = torch.autograd.grad(value.sum(), r)
    torch.testing.assert_close(slope(r.detach()), expected, rtol=1e-9, atol=1e-12)


S = closed.example(0.8)
REAL, FAKE, T = S.real(), S.fake(), torch.tensor(S.t, dtype=closed.F64)


def mean(family: str) -> closed.Mean:
    """The mean gradient of `expanded` in three dimensions, r being exact and differentiated."""

    def loss(at: closed.Sampled) -> torch.Tensor:
        r = (REAL.log_prob(at.xt, T) - FAKE.log_prob(at.xt, T)).exp()
        exact = S.dim / S.sigma**4
        return expanded(f_divergence(family), r, at.x, at.real, at.fake, exact)

    return closed.means(S, {"": loss}, 2 if family == "reverse_kl" else 14)[""]


def test_expanded_gradients_in_closed_form() -> None:
    """Half the Fisher divergence under p, under q, and both."""
    under_p = closed.gradient(closed.fisher, S) / 2
    under_q = closed.gradient(closed.data_fisher, S) / 2
    assert mean("reverse_kl").misses(under_p) < 1e-9
    assert mean("kl").misses(under_q) < 1e-6
    assert mean("jeffreys").misses(under_p + under_q) < 1e-6
    assert mean("kl").misses(under_p) > 0.2


def test_expanded_faces_the_sample_with_its_own_prediction() -> None:
    """By hand, with guidance apart: <delta, h (own - x) + (h - r h') / 2 delta> at r = 3."""
    x, real, fake, own = (torch.full((1, 1), v) for v in (0.5, 2.0, 1.0, 4.0))
    r = torch.tensor([3.0])
    js = f_divergence("js")
    value = expanded(js, r, x, real, fake, 2.0, own)
    assert float(value) == pytest.approx(2 * (0.75 * 3.5 + (0.75 - 3 / 16) / 2))
    plain = expanded(js, r, x, real, fake, 2.0)
    assert float(plain) == pytest.approx(2 * (0.75 * 0.5 + (0.75 - 3 / 16) / 2))
    with pytest.raises(ValueError, match=r"own has shape"):
        expanded(js, r, x, real, fake, 2.0, torch.zeros(1, 2))


def test_families_differ() -> None:
    """No two have one h, so that the test above cannot be passed by a copied line."""
    r = torch.tensor([0.3, 2.0], dtype=torch.float64)
    rows = torch.stack([one.h(r) for one in DIVERGENCES.values()])
    apart = torch.cdist(rows, rows) + torch.eye(len(rows), dtype=torch.float64)
    assert float(apart.min()) > 0.05


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is one of reverse_kl, kl, .* got 'rkl'"):
        f_divergence("rkl")
