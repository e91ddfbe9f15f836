"""The sampler of networks with a head for each interval: fused heads are its steps in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.diffusion.heads import Heads
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, expand
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, course
from fewstep.nets.mlp import MLP
from tests.networks import stirred
from tests.quadrature import F64

Z = Draws.range(0, 5).normal("z", (2,), F64)


def network(path: NoisePath, heads: int = 6) -> Any:
    return stirred(Model(MLP(8, 1), (2,), 0, path, heads=heads).build().double())


@pytest.mark.parametrize(("path", "start"), [(VE(), 2.5), (Flow(), 1.0), (VP(), 999.0)], ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_block_is_its_intervals_in_turn(path: NoisePath, start: float, steps: int) -> None:
    """X_k+1 = X_k - (tau_k - tau_k+1) (X_n - g_k) / tau_n, by hand, on scaled states."""
    net, sampler = network(path), ParallelDecoding(start, steps, 6)
    times, tau = sampler.times(path), sampler.flow_times(path)
    x = Z * path.sigma(torch.tensor(start, dtype=F64))
    for n in range(0, 6, sampler.block):
        t = torch.full((5,), times[n], dtype=F64)
        size = expand(path.alpha(t) + path.sigma(t), x)
        said, here = net.answers(x, t), x / size
        there = here
        for k in range(n, n + sampler.block):
            there = there - (tau[k] - tau[k + 1]) * (here - said[k]) / tau[n]
        if n + sampler.block < 6:
            s = torch.full((5,), times[n + sampler.block], dtype=F64)
            there = there * expand(path.alpha(s) + path.sigma(s), x)
        x = there
    torch.testing.assert_close(sampler(net, Z), x, rtol=1e-9, atol=1e-9)


def test_equal_heads_are_ddim() -> None:
    net = Model(MLP(8, 1), (2,), heads=6).build().double()
    made = ParallelDecoding(2.5, 3, 6)(net, Z)
    torch.testing.assert_close(made, FewStep(2.5, 3, "ddim")(net.net, Z), rtol=1e-9, atol=1e-9)


def test_other_networks_and_settings_are_refused() -> None:
    for net in (network(VE(), 3), Model(MLP(8, 1), (2,)).build()):
        with pytest.raises(ValueError, match="is for a network with 6 heads, and"):
            ParallelDecoding(2.5, 2, 6)(net, Z)
    with pytest.raises(ValueError, match="a multiple of its steps"):
        ParallelDecoding(2.5, 4, 6)
    with pytest.raises(ValueError, match="t_init > 0"):
        ParallelDecoding(0.0)
    assert isinstance(Heads(network(VE(), 3), 2).net, type(network(VE(), 3).net))


def test_its_course_is_known_without_a_network() -> None:
    """What exports and model cards say of it: the times of the calls, and no noise."""
    found = course(ParallelDecoding(2.5, 2, 6), VE())
    assert found.times == pytest.approx([2.5, 1.25])
    assert (found.start, found.noises) == (2.5, 0)
