"""States of samplers: a chain, computed when they are read; and training through one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VE, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, Jumps
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State
from tests.instances import SAMPLERS

F64 = torch.float64
Z = Draws.range(0, 16).normal("z", (2,), F64)
LAW = Uniform(0.5, 2.5)


@dataclass(frozen=True)
class Noted(Draws):
    """Draws that note what they were asked for."""

    asked: list[str] = field(default_factory=list)

    def normal(self, purpose: str, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        self.asked.append(purpose)
        return super().normal(purpose, shape, dtype)


class Bent(nn.Module):
    """A denoiser, and a flow map, that is not exact, and counts its calls."""

    def __init__(self, path: NoisePath = VE()) -> None:
        super().__init__()
        self.path, self.calls = path, 0
        self.w = nn.Parameter(torch.tensor([0.9, -0.4], dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        self.calls += 1
        shift = t if s is None else t + s.square()
        return torch.tanh(self.w * xt) + 0.3 * torch.cos(shift).reshape(-1, 1) * self.w.flip(0)


def noted() -> Noted:
    return Noted(torch.arange(16), 2)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_states_are_a_chain(sampler: Sampler) -> None:
    """From noise to data, one state a call; the last prediction is the sample, bit for bit."""
    net = Bent()
    states = list(sampler.states(net, Z, None, noted()))
    assert len(states) == sampler.calls == net.calls
    first, last = states[0], states[-1]
    torch.testing.assert_close(first.xt, first.t[:, None] * Z, rtol=0, atol=0)
    for state, after in pairwise(states):
        assert after.xt is state.xs
        assert torch.equal(after.t, state.s)
        assert (state.s <= state.t).all()
    assert last.xs is last.x0
    assert (last.s == 0).all()
    assert torch.equal(sampler(net, Z, None, noted()), last.x0)
    for state in states:
        assert state.path == net.path
        assert state.t.shape == state.s.shape == (16,)
        assert state.xt.shape == state.x0.shape == state.xs.shape == Z.shape
        back = perturb(state.path, state.x0, state.eps, state.t)
        torch.testing.assert_close(back, state.xt, rtol=1e-12, atol=1e-12)
        assert state.eps is state.eps


def test_the_correction_of_a_step_has_a_state_of_its_own() -> None:
    """Heun's second call is at the time that the first leads to, and stays there."""
    states = list(Heun(LAW, 3).states(Bent(), Z))
    assert [float(s.t[0]) for s in states] == [2.5, 1.5, 1.5, 0.5, 0.5]
    assert [float(s.s[0]) for s in states] == [1.5, 1.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_one_call_costs_its_calls_and_no_noise_beyond(k: int) -> None:
    """k calls and k - 1 renoisings; whoever asks for the next input pays for it, once."""
    net, draws, sampler = Bent(), noted(), FewStep(2.5, 4)
    x = sampler.part(k, net, Z, None, draws)
    assert net.calls == k
    assert draws.asked == [f"eps{j}" for j in range(1, k)]
    states: Iterator[State] = sampler.states(net, Z, None, draws)
    for _ in range(k):
        state = next(states)
    assert torch.equal(state.x0, x)
    draws.asked.clear()
    assert state.xs is state.xs
    assert draws.asked == ([f"eps{k}"] if k < 4 else [])
    assert [s.xt is state.xs for s in states] == [True, False, False][: 4 - k]


@pytest.mark.parametrize(
    "sampler", [Jumps(2.5, 3), Jumps(2.5, 4, 1.7), Heun(LAW, 3, 1), FewStep(2.5, 3, "ddim")]
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradient_is_that_of_one_call(sampler: Sampler, k: int) -> None:
    """As by hand at the input of call k, held fixed; the whole has another gradient."""
    net, z = Bent(), Z.clone().requires_grad_()
    states = list(sampler.states(net, z, None, noted()))
    state = states[k - 1]
    s = {"s": state.s} if isinstance(sampler, Jumps) else {}
    cut = net(state.xt.detach(), state.t, None, **s)
    x = sampler.part(k, net, z, None, noted())
    assert torch.equal(x, state.x0)
    expected, whole, found = (
        torch.autograd.grad((out * Z.flip(0)).sum(), net.w, retain_graph=True)[0]
        for out in (cut, state.x0, x)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ((whole - found).norm() > 1e-2 * found.norm()) == (k > 1)
    x.sum().backward()
    assert z.grad is None


@pytest.mark.parametrize("sampler", [Heun(), CFG(FewStep(), 2.0)], ids=repr)
def test_samplers_that_no_student_is_trained_through(sampler: Sampler) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        sampler.part(1, Bent(), Z)
    assert str(caught.value) == f"a student cannot be trained through {sampler}; use FewStep"


def test_a_sampler_is_its_states() -> None:
    """A new one defines `calls` and `states`; sampling and training through a call follow."""

    @dataclass(frozen=True)
    class Twice(Sampler):
        """Denoise, and denoise what came out."""

        @property
        def calls(self) -> int:
            return 2

        def states(
            self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
        ) -> Iterator[State]:
            t = torch.ones(len(z)).to(z)
            for s in (t, 0 * t):
                state = State(denoiser.path, t, s, z, denoiser(z, t, cond), lambda state: state.x0)
                yield state
                z = state.xs

    net = Bent()
    once = net(Z, torch.ones(16, dtype=F64))
    assert torch.equal(Twice().part(1, net, Z), once)
    assert torch.equal(Twice()(net, Z), net(once, torch.ones(16, dtype=F64)))
    with pytest.raises(ValueError, match=r"Twice\(\) has steps 1 to 2, got 3"):
        Twice().part(3, net, Z)


def test_guided_samplers_have_the_states_of_the_guided_denoiser() -> None:
    """Of f + kappa c where the condition adds c; what a denoiser takes by name is passed on."""

    class Lifted(Bent):
        def forward(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Any) -> Tensor:
            x0 = super().forward(xt, t, None, **named)
            return x0 if cond is None else x0 + cond[:, None]

    for sampler in (Heun(LAW, 3), Jumps(2.5, 2)):
        net, labels = Lifted(), torch.arange(16).to(F64) / 7
        found = [state.x0 for state in CFG(sampler, 3.0).states(net, Z, labels)]
        assert len(found) == sampler.calls == net.calls / 2
        expected = [state.x0 for state in sampler.states(net, Z, 3 * labels)]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
