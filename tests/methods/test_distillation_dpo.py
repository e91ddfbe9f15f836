"""DistillationDPO: the exact push on a Gaussian student, and where it rests, if it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Cond
from fewstep.distillation.fake_score import FakeScore, Rollout
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import give_decoder
from fewstep.losses.score import denoising
from fewstep.losses.weight import L1, Power
from fewstep.methods.distillation_dpo import DistillationDPO
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.methods.test_rewarded import MU, Slope, V, gaussian
from tests.mixture import exact, pretrained
from tests.quadrature import F64, Even, Line, quantiles

M = 1 / math.sqrt(math.pi)
"""The mean of the larger of two standard normal numbers."""


@dataclass(frozen=True, eq=False)
class Two(Even):
    """The second sample's noise, and one eps for both."""

    other: Tensor = torch.empty(0)

    def normal(self, purpose: str, shape: Any, dtype: Any = torch.float32) -> Tensor:
        return (self.other if purpose == "z" else self.noise).reshape(-1, *shape)


def rows(count: int = 80, levels: int = 8) -> Batch:
    """All pairs of two noises, each with all eps."""
    points, eps = quantiles(count), quantiles(levels)
    z, other, eps = torch.meshgrid(points, points, eps, indexing="ij")
    draws = Two(torch.arange(z.numel()), noise=eps.reshape(-1, 1), other=other.reshape(-1, 1))
    return Batch(z.reshape(-1, 1), None, None, draws)


class Side(nn.Module):
    """The denoiser of the larger (sign 1) or smaller (-1) of two samples of N(a, b^2)."""

    def __init__(self, a: float, b: float, sign: float) -> None:
        super().__init__()
        self.a, self.b, self.sign, self.path = a, b, sign, VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """By Tweedie: p(x_t) is a normal density times the probability to win, given x_t."""
        v, noise = self.b**2, t[:, None] ** 2
        s2, u = v + noise, xt - self.a
        k = self.sign * v / s2 / (v + v * noise / s2).sqrt()
        mills = (-((k * u) ** 2) / 2).exp() / math.sqrt(2 * math.pi) / torch.special.ndtr(k * u)
        score: Tensor = -u / s2 + k * mills
        return xt + noise * score


def pushed(
    a: float, b: float, t: float, winners: float = 1.0, losers: float = -1.0, **more: Any
) -> Tensor:
    """The gradient in (a, b) of the student a + b z, with the exact fake scores of both sides."""
    method = DistillationDPO(
        FewStep(80.0),
        reward=Slope(),
        winners=winners,
        losers=losers,
        times=Discrete((t,)),
        weight=Power(2, -2),
        **more,
    )
    student = Line(a, b)
    nets = Nets({"student": student, "fake": Side(a, b, 1), "fake_losers": Side(a, b, -1)})
    loss = method.student_loss(Rollout(method.sampler, 1), nets, gaussian(MU, V), rows())
    assert loss.total is not None
    return student.gradient(loss.total)


@pytest.mark.parametrize("t", [0.3, 2.5])
def test_the_published_signs_push_against_the_reward_wherever_the_student_is(t: float) -> None:
    """2 m / (V + t^2) for every mean, so that none is held; in x_t - x the sample cancels."""
    for a in (MU, MU - 3.0, MU + 2.0):
        found = float(pushed(a, 0.5, t)[0])
        assert found == pytest.approx(2 * 0.5 * M / (V + t * t), rel=0.02)
    x = torch.randn(7, 1, dtype=F64, requires_grad=True)
    factor, noise = torch.randn(2, 7, 1, dtype=F64)
    (nothing,) = torch.autograd.grad((factor * ((x + t * noise) - x)).mean(), [x])
    assert float(nothing.abs().max()) == 0


@pytest.mark.parametrize("factors", [(0.0, 1.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_where_a_pull_of_both_sides_rests(factors: tuple[float, float]) -> None:
    """mu + m (losers - winners) / (losers + winners); control: half a standard deviation away."""
    w, h = factors
    for t in (0.3, 2.5):
        m = 0.5 * M
        rest = MU + m * (h - w) / (h + w)
        assert float(pushed(rest, 0.5, t, w, h)[0]) == pytest.approx(0, abs=8e-3 / (V + t * t))
        slope = (w + h) / (V + t * t)
        assert float(pushed(rest + 0.25, 0.5, t, w, h)[0]) == pytest.approx(0.25 * slope, rel=0.05)


def test_noise_that_is_scaled_makes_pairs_of_its_own() -> None:
    """z and 1.1 z: the larger has the mean 0.05 E|z| b, whatever the other draws are."""
    method = DistillationDPO(FewStep(80.0), reward=Slope(), scale=1.1)
    teacher, at = gaussian(MU, V), rows()
    nets = Nets({"student": Line(MU, 0.5)})
    sides = method.drawn(Rollout(method.sampler, 1), nets, teacher, at)
    made = MU + 0.5 * torch.stack([at.z, 1.1 * at.z])
    torch.testing.assert_close(sides.winners, made.amax(0))
    torch.testing.assert_close(sides.losers, made.amin(0))
    assert float(sides.reward) == pytest.approx(MU, abs=1e-12)
    m = 0.05 * math.sqrt(2 / math.pi) * 0.5
    assert float(sides.winners.mean() - MU) == pytest.approx(m, rel=0.01)


def test_each_fake_score_learns_its_own_side() -> None:
    """Their losses by hand, of the same pairs."""
    method = DistillationDPO(
        FewStep(80.0), reward=Slope(), fake=FakeScore(Discrete((0.7,)), Power())
    )
    nets = method.init(gaussian(0.0, 1.0), Line(MU, 0.5))
    nets["student"] = Line(MU, 0.5)
    for name, mean in (("fake", 3.0), ("fake_losers", -2.0)):
        nets[name] = gaussian(mean, 1.0)
    at, teacher = rows(), gaussian(MU, V)
    fakes, student = method.turns(0)[:2], method.turns(0)[2]
    assert [turn.net for turn in fakes] == ["fake", "fake_losers"]
    assert student.net == "student"
    draws = at.draws
    assert isinstance(draws, Two)
    made = MU + 0.5 * torch.stack([at.z, draws.other])
    for turn, x in zip(fakes, (made.amax(0), made.amin(0)), strict=True):
        t = torch.full((len(x),), 0.7, dtype=F64)
        net: Any = nets[turn.net]
        expected = denoising(net(x + 0.7 * draws.noise, t), x).mean()
        total = turn.loss(nets, teacher, at).total
        assert total is not None
        torch.testing.assert_close(total, expected)


def test_equals_are_won_by_the_first_and_factors_of_nothing_refused() -> None:
    @dataclass(frozen=True)
    class Flat(Slope):
        def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
            return torch.zeros(len(pictures), dtype=F64)

    method = DistillationDPO(FewStep(80.0), reward=Flat())
    at = rows(4, 2)
    assert (method.winners, method.losers) == (1.0, -1.0)
    nets = Nets({"student": Line(0.0, 1.0)})
    sides = method.drawn(Rollout(method.sampler, 1), nets, gaussian(MU, V), at)
    torch.testing.assert_close(sides.winners, at.z)
    with pytest.raises(ValueError, match=r"^DistillationDPO.winners and losers are not both 0"):
        DistillationDPO(reward=Slope(), winners=0.0, losers=0.0)


def test_draws_of_the_second_sample_are_its_own() -> None:
    method = DistillationDPO(FewStep(80.0), reward=Slope())
    draws = Draws.range(0, 64)
    at = Batch(draws.normal("z", (1,), F64), None, None, draws)
    nets = Nets({"student": Line(0.0, 1.0)})
    sides = method.drawn(Rollout(method.sampler, 1), nets, gaussian(MU, V), at)
    assert not bool(sides.winners.isclose(sides.losers).any())
    either = sides.winners.isclose(at.z) | sides.losers.isclose(at.z)
    assert bool(either.all())


@pytest.mark.slow
def test_the_reward_rises_above_the_teachers_where_what_loses_is_pulled() -> None:
    """Through the loop, on a mixture of which the mean is the reward; control: published signs."""
    teacher: Any = pretrained()
    give_decoder(teacher, lambda x: x[:, None, None])

    def worth(losers: float, winners: float) -> float:
        method = DistillationDPO(reward=Slope(), winners=winners, losers=losers, weight=L1())
        settings: Any = {"batch": 128, "ema": EMA(1000), "steps": 60, "optim": Optim(2e-3)}
        *_, last = train(method, teacher, pretrained(), Latents((2,)), **settings)
        draws = Draws.range(10**9, 2000, seed=1)
        x = method.sampler(last.state.average, draws.normal("z", (2,)), None, draws)
        return float(x.detach().mean())

    law = float(exact().mean())
    assert worth(1.0, 0.0) > law + 0.1
    assert worth(-1.0, 1.0) < law - 0.1
