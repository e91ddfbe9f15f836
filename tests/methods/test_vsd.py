"""VSD: its direction is the KL gradient times sigma^3 / alpha, with one scale on both networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.guidance_scales import LSG, Guidance, Kappas, Unguided
from fewstep.distillation.method import Nets
from fewstep.losses.score import denoising, kl
from fewstep.losses.weight import Power, SignalNoise, Weight
from fewstep.methods.vsd import VSD
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.gaussians import example, gradient, kl_divergence, means
from tests.quadrature import F64, Line, batch


def weights(path: NoisePath, t: float, weight: Weight) -> tuple[Tensor, float, float]:
    time = torch.tensor(t, dtype=F64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    return weight(time, time, alpha, sigma), float(alpha), float(sigma)


@pytest.mark.parametrize(("path", "t"), [(VP(), 300.0), (TrigFlow(), 0.7)])
def test_the_weight_on_a_variance_preserving_path(path: NoisePath, t: float) -> None:
    """alpha sigma: sigma^2 of the difference of eps, and sigma^3 / alpha of the KL direction."""
    found, alpha, sigma = weights(path, t, SignalNoise())
    assert float(found) == pytest.approx(alpha * sigma, rel=1e-12)
    assert float(found) == pytest.approx(sigma**3 / alpha * (alpha / sigma) ** 2, rel=1e-12)
    xt, real, fake = torch.randn(3, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    eps = [(xt - alpha * f) / sigma for f in (real, fake)]
    torch.testing.assert_close(sigma**2 * (eps[0] - eps[1]), found * (fake - real))


def test_the_fake_score_is_weighed_as_published() -> None:
    """alpha^2 times the eps loss is alpha^4 / sigma^2 times the x_0 loss."""
    x0, guess = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    weight, alpha, sigma = weights(VP(), 400.0, Power(4, -2))
    eps_loss = ((alpha / sigma * (x0 - guess)) ** 2).mean(1)
    torch.testing.assert_close(denoising(guess, x0, weight), alpha**2 * eps_loss)


def test_weights_agree_over_paths_at_the_same_noise() -> None:
    """sigma / alpha = 1.5 on four paths."""
    ratio = 1.5
    flow = torch.tensor(ratio / (1 + ratio), dtype=F64)
    for path in (VE(), Flow(), TrigFlow(), VP()):
        found, _, _ = weights(path, float(path.time_of(flow)), SignalNoise())
        assert float(found) == pytest.approx(ratio / (1 + ratio**2), rel=1e-5)


@pytest.mark.parametrize(("path", "t"), [(VP(), 400.0), (TrigFlow(), 0.9)])
def test_the_direction_is_the_gradient_of_kl(path: NoisePath, t: float) -> None:
    s = example(t, path)
    alpha, sigma = s.alpha, s.sigma
    weight = weights(path, t, SignalNoise())[0]
    found = means(s, {"vsd": lambda p: 3 * kl(p.x, p.real, p.fake, weight)})["vsd"]
    assert found.misses(sigma**3 / alpha * gradient(kl_divergence, s)) < 1e-9
    wrong = means(s, {"sigma": lambda p: 3 * kl(p.x, p.real, p.fake, sigma)})["sigma"]
    assert wrong.misses(sigma**3 / alpha * gradient(kl_divergence, s)) > 0.1


class Conditional(nn.Module):
    """Label 0 is N(1, 1/4); without a label, N(-1, 1/4) is as likely."""

    def __init__(self) -> None:
        super().__init__()
        variance = torch.tensor([[0.25]], dtype=F64)
        self.one = Gaussian(torch.tensor([1.0], dtype=F64), variance, VE())
        means = torch.tensor([[1.0], [-1.0]], dtype=F64)
        half = torch.tensor([0.5, 0.5], dtype=F64)
        self.both = GaussianMixture(means, variance.expand(2, 1, 1), half, VE())
        self.path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return (self.both if cond is None else self.one)(xt, t)


def pushed(guidance: Guidance) -> Tensor:
    """The gradient for a student that has the teacher's law, N(1, 1/4), in KL's units."""
    m = VSD(FewStep(80.0), Discrete((0.5,)), Power(2, -2), guidance=guidance)
    student, net = Line(1.0, 0.5), Conditional()
    at = batch(200)
    at = at._replace(cond=torch.zeros(len(at.z), dtype=torch.int64))
    found = m.student_loss(Rollout(m.sampler, 1), Nets({"student": student, "fake": net}), net, at)
    assert found.total is not None
    return student.gradient(found.total)


def test_guidance_of_both_keeps_the_fixed_point() -> None:
    for guidance in (Unguided(), LSG(7.5)):
        assert float(pushed(guidance).norm()) < 1e-12


def test_guidance_of_the_teacher_alone_moves_it() -> None:
    """The control: the golden bias of scale 7.5."""
    assert float(pushed(Kappas(real=7.5))[0]) == pytest.approx(-3.0032, rel=5e-3)


def test_the_student_moves_first_and_the_fake_score_at_its_own_rate() -> None:
    student, fake = VSD(fake_rate=1000.0).turns(0)
    assert (student.net, student.rate) == ("student", 1.0)
    assert (fake.net, fake.rate) == ("fake", 1000.0)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"VSD.fake_rate is positive, got 0"):
        VSD(fake_rate=0.0)
