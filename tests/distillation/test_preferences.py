"""Preferences: whose likelihood is compared, by hand; where they end is in test_pso.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import give_decoder
from fewstep.distillation.preferences import Preference, log_ratio
from tests.methods.test_pso import S, TwoCalls
from tests.methods.test_rewarded import Slope
from tests.quadrature import F64


@pytest.mark.parametrize("path", [VE(), Flow()], ids=repr)
def test_the_ratio_is_that_of_normal_densities(path: NoisePath) -> None:
    """A mean over dimensions, at the time that the call leads to."""
    net, sampler = TwoCalls(0.3, path), FewStep(times=(0.9, 0.4))
    draws = Draws.range(0, 5)
    first = next(sampler.states(net, draws.normal("z", (3,), F64), None, draws))
    now, before = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = torch.tensor(0.4, dtype=F64)
    alpha, sigma = path.alpha(s), path.sigma(s)
    p, q = (torch.distributions.Normal(alpha * d, sigma).log_prob(first.xs) for d in (now, before))
    expected = (p - q).mean(1)
    torch.testing.assert_close(log_ratio(first, now, before), expected.detach())


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_loss_of_one_pair_by_hand(labels: Any) -> None:
    """The second call keeps what it is given, so that rewards are the drawn states themselves."""
    sampler, beta, m = FewStep(times=(3.0, S)), 2.0, 0.3
    preference = Preference(Slope(), beta, 1e-9, 1e9, labels)
    nets = Nets({"student": TwoCalls(m), "reference": TwoCalls(0.0)})
    reference: Any = nets["reference"]
    net: Any = nets["student"]
    give_decoder(reference, lambda x: x[:, :, None, None])
    draws = Draws.range(0, 1)
    batch = Batch(draws.normal("z", (1,), F64), None, None, draws)
    other = draws.under("other")
    drawn = [batch, batch._replace(z=other.normal("z", (1,)).double(), draws=other)]
    ends = [next(sampler.states(net, b.z, None, b.draws)).xs for b in drawn]
    x, y = (float(end.detach()) for end in ends)
    assert x != y

    def log_rho(x: float) -> float:
        return (x**2 - (x - m) ** 2) / (2 * S**2)

    first = 1 / (1 + math.exp(y - x)) if labels == "soft" else float(x > y)
    margin = beta * (log_rho(x) - log_rho(y))
    sides = [math.log1p(math.exp(sign * margin)) for sign in (-1, 1)]
    expected = first * sides[0] + (1 - first) * sides[1]
    found = preference.loss(sampler, 1, nets, reference, batch)
    assert isinstance(found.total, Tensor)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-9)
    assert float(found.logs["reward"]) == pytest.approx((x + y) / 2)
