"""A small mixture: what is exact, and what a network learns of it from samples."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.samplers import Heun
from tests.mixture import BOUND, MIXTURE, MODEL, distance, energy_distance, exact, pretrained


def test_exact_samples_meet_the_bound() -> None:
    assert abs(energy_distance(exact(), exact(seed=1))) < BOUND / 10


@pytest.mark.slow
@torch.no_grad()
def test_pretraining_learns_the_denoiser() -> None:
    """Squared error against the exact denoiser, in units of the posterior's variance: < 3 %.

    The untrained network, which is the best linear denoiser, is off by 13 to 136 %.
    """
    x0, eps = exact(), torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))
    for time in (0.1, 0.3, 0.7, 1.5, 3.0):
        t = torch.tensor(time)
        xt = x0 + t * eps
        best = MIXTURE(xt, t)
        variance = (best - x0).square().mean()
        assert (pretrained()(xt, t) - best).square().mean() < 0.03 * variance
        assert (MODEL.build()(xt, t) - best).square().mean() > 0.1 * variance


def test_the_learned_denoiser_samples_the_mixture() -> None:
    assert distance(pretrained(), Heun()) < BOUND
    assert distance(MODEL.build(), Heun()) > 5 * BOUND
