"""States with more noise: the path's kernel, and the target that is their score."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.distillation.boundary import renoise

F64 = torch.float64


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
def test_the_target_of_a_state_is_its_score(path: NoisePath) -> None:
    """(x_t - sigma_t^2 eps / tau) / alpha_t, times share; x itself where s is the data."""
    tau_t, tau_s = torch.tensor([0.7], dtype=F64), torch.tensor([0.4], dtype=F64)
    t, s = path.time_of(tau_t), path.time_of(tau_s)
    xs, eps = torch.tensor([[0.3]], dtype=F64), torch.tensor([[-1.2]], dtype=F64)
    n, share, target = renoise(path, xs, eps, s, t)
    alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    tau = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt()
    torch.testing.assert_close(n.xt, (alpha / alpha_s * xs + tau * eps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(share, (tau / sigma)[:, None], rtol=1e-9, atol=1e-9)
    expected = share * (n.xt - sigma**2 * eps / tau) / alpha
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    clean = renoise(path, xs, eps, None, t)
    assert torch.equal(clean.target, xs)
    torch.testing.assert_close(clean.noised.xt, alpha * xs + sigma * eps)
    assert renoise(path, xs, eps, s, s).target.isfinite().all()  # tau = 0


def test_the_target_is_finite_at_pure_noise() -> None:
    one = torch.ones(1, dtype=F64)
    xs, eps = 0.3 * one[:, None], -1.2 * one[:, None]
    assert float(renoise(Flow(), xs, eps, 0.5 * one, one).target) == pytest.approx(0.6)
