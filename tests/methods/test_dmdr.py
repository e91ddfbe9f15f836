"""DMDR: its schedule, its law of times, and where distillation and reward balance on the way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batches import Latents
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.fake_score import FakeScore, Rollout
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import give_decoder
from fewstep.eval.picture_networks import Ink
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, EDMWeight, Power
from fewstep.methods.dmdr import DMDR, FlowBeta
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.methods.test_rewarded import LAM, MU, Slope, V, gaussian
from tests.mixture import distance, pretrained
from tests.quadrature import F64, Line, batch

U = torch.linspace(0.001, 0.999, 999, dtype=F64)
HALF = torch.tensor(0.5, dtype=F64)


@pytest.mark.parametrize("path", [Flow(1e-9), VE(1e-9, 1e9), TrigFlow(1e-9)], ids=repr)
def test_times_invert_the_distribution_function(path: NoisePath) -> None:
    """Of three laws with a polynomial one, at equal flow times on three paths."""
    whole = {
        (1.0, 1.0): lambda x: x,
        (2.0, 2.0): lambda x: x**2 * (3 - 2 * x),
        (4.0, 1.0): lambda x: x**4,
    }
    for (a, b), share in whole.items():
        tau = path.flow_time(FlowBeta(path, a, b).quantile(U))
        torch.testing.assert_close(share(tau), U, rtol=0, atol=1e-6)


def test_the_start_of_the_published_law() -> None:
    """Mean a / (a + b) and variance of Beta(4, 1.5); finite at both ends, whole of shape."""
    law = FlowBeta(Flow(), 4.0, 1.5)
    tau = law.quantile((torch.arange(20_000, dtype=F64) + 0.5) / 20_000)
    assert float(tau.mean()) == pytest.approx(4 / 5.5, abs=1e-5)
    assert float(tau.var()) == pytest.approx(6 / (5.5**2 * 6.5), rel=1e-4)
    ends = law.quantile(torch.tensor([[0.0, 1.0]]))
    assert ends.tolist() == [[pytest.approx(1e-3), pytest.approx(1.0)]]
    assert ends.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^FlowBeta needs a >= 1 and b >= 1, got 0.5 and 1"):
        FlowBeta(Flow(), 0.5)


def test_what_is_dynamic_fades_by_a_cosine() -> None:
    method = DMDR(reward=Ink(), dynamic=100)
    assert [method.fade(step) for step in (0, 50, 100, 7000)] == pytest.approx([1, 0.5, 0, 0])
    assert method.fade(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    laws = [method.law(fade, VP()) for fade in (1.0, 0.5, 0.0)]
    assert laws == [FlowBeta(VP(), 4.0, 1.5), FlowBeta(VP(), 2.5, 1.25), FlowBeta(VP())]
    assert method.noise_levels(VP()) == FlowBeta(VP())
    assert DMDR(reward=Ink(), dynamic=0).fade(0) == 0


def gradient(a: float, fade: float, rewarded: bool = True, weight: Any = Power(2, -2)) -> Tensor:
    """Of the student a + V^(1/2) z, the fake score exact, at the median of the law of times."""
    method = DMDR(FewStep(80.0), reward=Slope(), reward_weight=LAM, weight=weight)
    student = Line(a, V**0.5)
    nets = Nets({"student": student, "fake": gaussian(a, V)})
    rollout = Rollout(method.sampler, 1)
    loss = method.student_loss(fade, rewarded, rollout, nets, gaussian(MU, V), batch(40))
    assert loss.total is not None
    assert set(loss.logs) == ({"score", "reward", "reward_std"} if rewarded else {"score"})
    return student.gradient(loss.total)


@pytest.mark.parametrize("fade", [0.0, 0.5, 1.0])
def test_where_distillation_and_reward_balance(fade: float) -> None:
    """mu + lambda (V + t^2) / (1 - s), with the spread kept; controls: s and the law forgotten."""
    tau = float(FlowBeta(Flow(1e-9), 1 + 3 * fade, 1 + 0.5 * fade).quantile(HALF))
    t, s = tau / (1 - tau), 0.75 * fade
    shift = LAM * (V + t * t) / (1 - s)
    assert float(gradient(MU + shift, fade).abs().max()) < 1e-12
    if fade:
        assert abs(float(gradient(MU + shift * (1 - s), fade)[0])) > 0.1
        assert abs(float(gradient(MU + LAM * (V + 1) / (1 - s), fade)[0])) > 0.1
    cold = float(gradient(MU + shift, fade, rewarded=False)[0])
    assert cold == pytest.approx(LAM, rel=1e-9)


def test_the_normaliser_is_of_the_mixed_target() -> None:
    """DMD's weight with what the student is pulled to, by hand."""
    fade, a = 0.4, 2.0
    tau = FlowBeta(Flow(1e-9), 1 + 3 * fade, 1 + 0.5 * fade).quantile(HALF)
    t = (tau / (1 - tau)).expand(1600)
    student, at, fake, teacher = Line(a, V**0.5), batch(40), gaussian(a, V), gaussian(MU, V)
    x = student(80 * at.z, torch.full((1600,), 80.0, dtype=F64))
    assert at.draws is not None
    xt = x + t[:, None] * at.draws.normal("eps", (1,))
    own = fake(xt, t)
    target = teacher(xt, t) + 0.75 * fade * (own - teacher(xt, t))
    weight = 1 / (x - target).abs().clamp_min(1e-5)
    by_hand = student.gradient(kl(x, target, own, weight.detach()).mean())
    found = gradient(a, fade, rewarded=False, weight=L1())
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-7)


def test_the_fake_score_learns_at_the_times_of_the_step() -> None:
    nets = Nets({"student": Line(2.0, 0.5), "fake": gaussian(0.0, 1.0)})
    method = DMDR(FewStep(80.0), reward=Ink(), dynamic=100, ratio=2)
    for step in (0, 60, 100):
        *fakes, student = method.turns(step)
        assert [turn.net for turn in (*fakes, student)] == ["fake", "fake", "student"]
        expected = FakeScore(method.law(method.fade(step), VE()), EDMWeight()).turn(method.sampler)
        found = [t.loss(nets, gaussian(MU, V), batch(9)).total for t in (*fakes, expected)]
        assert found[0] == found[1] == found[2]


def test_the_reward_comes_after_the_cold_start() -> None:
    method = DMDR(FewStep(80.0), reward=Slope(), cold=7, dynamic=5)
    nets = Nets({"student": Line(MU, 0.5), "fake": gaussian(MU, V)})
    logs = [
        method.turns(step)[-1].loss(nets, gaussian(MU, V), batch(9)).logs for step in (6, 7, 900)
    ]
    assert ["reward" in one for one in logs] == [False, True, True]


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"reward_weight": 0.0}, {"cold": -1}, {"dynamic": -1}):
        with pytest.raises(ValueError, match=r"^DMDR needs reward_weight > 0, and cold and"):
            DMDR(reward=Ink(), **wrong)  # type: ignore[arg-type]
    for wrong in ({"lead": 1.0}, {"start": (0.5, 1.0)}):
        with pytest.raises(ValueError, match=r"^DMDR needs 0 <= lead < 1 and start of 1 or more"):
            DMDR(reward=Ink(), **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_distils_and_then_follows_the_reward() -> None:
    """Near the mixture before there is a reward, and worth more after it."""
    teacher: Any = pretrained()
    give_decoder(teacher, lambda x: x[:, None, None])
    method = DMDR(reward=Slope(), reward_weight=1.0, cold=150, dynamic=75, ratio=2)
    settings: Any = {"batch": 128, "ema": EMA(2000), "steps": 200}
    settings["optim"] = Optim(2e-3, (0.0, 0.99))

    def worth(net: Any) -> float:
        draws = Draws.range(10**9, 2000, seed=1)
        return float(method.sampler(net, draws.normal("z", (2,)), None, draws).detach().mean())

    for record in train(method, teacher, pretrained(), Latents((2,)), **settings):
        if record.step == 150:
            before = worth(record.state.average)
            assert distance(record.state.average, method.sampler) < 0.02
    assert worth(record.state.average) > before + 0.03
