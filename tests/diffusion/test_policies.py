"""Policies: a mixture that is the posterior is the teacher at every state; grids interpolate."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, expand
from fewstep.diffusion.policies import (
    DX,
    LOG_SD,
    FollowPolicy,
    GMFlow,
    PolicyKind,
    Source,
    roll,
    scaled,
)
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, course
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from tests.networks import stirred
from tests.quadrature import F64

MODES = torch.tensor([[1.0, 0.5], [-0.8, 0.3], [0.1, -1.2]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
VARIANCE = 0.09
STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 0.9),
    "trig": (TrigFlow(), 1.4),
    "vp": (VP(), 900.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


def mixture(path: NoisePath) -> GaussianMixture:
    return GaussianMixture(MODES, torch.tensor(VARIANCE, dtype=F64), WEIGHTS, path)


class Posterior(nn.Module):
    """The heads that say the law of x_0 given x_t of this mixture."""

    def __init__(self, path: NoisePath, moved: float = 0.0) -> None:
        super().__init__()
        self.path, self.moved = path, moved
        self.head_count = 7

    def answers(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        var = alpha**2 * VARIANCE + sigma**2
        off = xt - alpha * MODES[:, None]
        means = MODES[:, None] + alpha * VARIANCE / var * off
        logs = WEIGHTS.log()[:, None, None] - 0.5 * (off**2).sum(2, keepdim=True) / var
        tau = self.path.flow_time(t)[:, None]
        spread = 0.5 * (VARIANCE * sigma**2 / var).log() - tau.log() - LOG_SD + self.moved
        return torch.cat([means, logs.expand_as(means), (means[0] + spread)[None]])


def states(path: NoisePath, start: float) -> tuple[Tensor, Tensor, Source]:
    z = Draws.range(0, 9).normal("z", (2,), F64)
    t = torch.full((9,), start, dtype=F64)
    xt = z * path.sigma(t)[:, None] + 0.3
    return xt, t, FollowPolicy(start).source(path, xt, t, torch.zeros_like(t))


@each_path
def test_the_posterior_is_the_teacher_everywhere(name: str) -> None:
    """At states that no flow leads to, down to little noise, to 1e-9."""
    path, start = STARTS[name]
    xt, t, source = states(path, start)
    off = Draws.range(0, 9).normal("off", (2,), F64)
    for share in (1.0, 0.7, 0.3, 0.02):
        s = path.time_of(path.flow_time(t) * share)
        x, tau = scaled(path, 0.5 * xt + 0.4 * off, s)
        want = mixture(path)(0.5 * xt + 0.4 * off, s)
        if share == 1.0:
            x, tau, want = source.x, source.tau, mixture(path)(xt, t)
        pi = GMFlow(3).read(Posterior(path).answers(xt, t), source)
        torch.testing.assert_close(pi(x, tau), want, rtol=1e-7, atol=1e-7)
        other = GMFlow(3).read(Posterior(path, 0.5).answers(xt, t), source)
        assert share == 1.0 or (other(x, tau) - want).abs().max() > 1e-3


@each_path
@pytest.mark.parametrize("steps", [1, 2])
def test_following_it_is_the_teachers_many_steps(name: str, steps: int) -> None:
    """Calls by substeps of DDIM, even in flow time, in one call or two."""
    path, start = STARTS[name]
    sampler = FollowPolicy(start, steps, policy=GMFlow(3), substeps=12)
    z = Draws.range(0, 9).normal("z", (2,), F64)
    net: Any = Posterior(path)
    made = sampler(net, z)
    times = torch.tensor([*sampler.ladder(path)], dtype=F64)
    ends = [*path.flow_time(times).tolist(), 0.0]
    first = times[0]
    x = z * path.sigma(first) / (path.alpha(first) + path.sigma(first))
    for now, then in pairwise(ends):
        for k in range(12):
            a, b = (now + (then - now) * i / 12 for i in (k, k + 1))
            t = path.time_of(torch.full((9,), a, dtype=F64))
            size = expand(path.alpha(t) + path.sigma(t), x)
            x = x + (1 - b / a) * (mixture(path)(size * x, t) - x)
    torch.testing.assert_close(made, x, rtol=1e-6, atol=1e-6)
    assert [state.s[0] > 0 for state in sampler.states(net, z)] == [True] * (steps - 1) + [False]


def test_a_state_says_the_single_step_that_leads_there() -> None:
    sampler = FollowPolicy(2.5, 2, policy=GMFlow(3))
    net: Any = Posterior(VE())
    first, second = sampler.states(net, Draws.range(0, 9).normal("z", (2,), F64))
    torch.testing.assert_close(VE().ddim(first.xt, first.x0, first.t, first.s), second.xt)
    source = sampler.source(VE(), first.xt, first.t, first.s)
    pi = sampler.read(net, first.xt, first.t, None, source)
    there = roll(pi, source.x, source.tau, source.end, 32)
    torch.testing.assert_close(scaled(VE(), second.xt, second.t)[0], there)


@pytest.mark.parametrize("kind", [DX(4), GMFlow(2), DX(2), GMFlow(1)], ids=repr)
def test_equal_heads_are_one_step_of_ddim(kind: PolicyKind) -> None:
    """A frozen x_0 for DX; the mixture of sd 0.05 tau comes near it."""
    net: Any = stirred(Model(MLP(8, 1), (2,), heads=kind.heads).build()).double()
    for layer in net.layers:
        layer.load_state_dict(net.net.net.last.state_dict())
    z = Draws.range(0, 9).normal("z", (2,), F64)
    made = FollowPolicy(2.5, 2, policy=kind)(net, z)
    plain = FewStep(2.5, 2, "ddim")(net.net, z)
    near = 1e-9 if isinstance(kind, DX) else 0.2
    torch.testing.assert_close(made, plain, rtol=near, atol=near)


def test_a_grid_is_linear_between_its_points() -> None:
    x, tau = torch.zeros(1, 1, dtype=F64), torch.tensor([[0.8]], dtype=F64)
    source = Source(x, tau, torch.tensor([[0.2]], dtype=F64))
    answers = torch.tensor([1.0, 2.0, 4.0], dtype=F64)[:, None, None]
    pi = DX(3).read(answers, source)
    for at, want in ((0.9, 1.0), (0.8, 1.0), (0.65, 1.5), (0.5, 2.0), (0.35, 3.0), (0.1, 4.0)):
        assert float(pi(x, torch.full_like(tau, at))) == pytest.approx(want, abs=1e-12)


def test_dropped_components_have_no_weight() -> None:
    path, start = STARTS["flow"]
    xt, t, source = states(path, start)
    answers = Posterior(path).answers(xt, t)
    gone = torch.zeros(9, 3, dtype=torch.bool)
    gone[4, 0] = gone[4, 2] = True
    pi = GMFlow(3).read(answers, source, gone)(source.x, source.tau)
    whole = GMFlow(3).read(answers, source)(source.x, source.tau)
    torch.testing.assert_close(pi[4], answers[1, 4])
    torch.testing.assert_close(pi[:4], whole[:4])


def test_the_start_is_the_published_spread() -> None:
    """v = (0.05 tau)^2 where all heads agree: the shrinkage of a component away from its mean."""
    x, tau = torch.full((1, 1), 0.4, dtype=F64), torch.full((1, 1), 0.5, dtype=F64)
    answers = torch.full((3, 1, 1), 0.7, dtype=F64)
    pi = GMFlow(1).read(answers, Source(x, tau, tau * 0))
    at = torch.full((1, 1), 0.25, dtype=F64)
    v, k, b = (0.05 * 0.5) ** 2, 9.0 - 1.0, 3 / 0.25 * 0.4 - 1 / 0.5 * 0.4
    assert math.isclose(float(pi(x, at)), (0.7 + v * b) / (1 + v * k), rel_tol=1e-12)


def test_other_networks_and_settings_are_refused() -> None:
    z = torch.zeros(2, 2)
    net: Any = Model(MLP(8, 1), (2,), heads=4).build()
    with pytest.raises(
        ValueError, match=r"GMFlow.* is for a network with 17 heads, and Heads has 4"
    ):
        FollowPolicy(2.5)(net, z)
    with pytest.raises(ValueError, match="EDM has none"):
        FollowPolicy(2.5)(net.net, z)
    with pytest.raises(ValueError, match=r"FollowPolicy.substeps is 1 or more, got 0"):
        FollowPolicy(2.5, substeps=0)
    with pytest.raises(ValueError, match="points is 2 or more"):
        DX(1)
    with pytest.raises(ValueError, match="components is 1 or more"):
        GMFlow(0)


def test_its_course_is_known_without_a_network() -> None:
    """What exports and model cards say of it: the times of the calls, and no noise."""
    found = course(FollowPolicy(2.5, 2), VE())
    assert found.times == pytest.approx([2.5, 1.25])
    assert (found.start, found.noises) == (2.5, 0)


def test_its_times_are_those_of_the_ladder() -> None:
    sampler = FollowPolicy(4.0, 2, 2.0, policy=GMFlow(3))
    assert sampler.calls == 2
    assert sampler.ladder(VE()) == [4.0, 1.0]
    with pytest.raises(
        ValueError, match=r"^FollowPolicy needs steps >= 1, t_init > 0 and rho > 0"
    ):
        FollowPolicy(0.0)
