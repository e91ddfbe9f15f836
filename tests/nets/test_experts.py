"""Experts: each call meets the network of its time, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow
from fewstep.nets.experts import Experts, ExpertsNet
from fewstep.nets.mlp import MLP
from tests.networks import stirred

MODEL = Model(Experts(MLP(16, 1), (0.6, 0.3)), (2,), 5, Flow(), "velocity")
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.3, 0.2])
NUMBERS = [0, 2, 0, 1, 1, 2]
"""A time on a bound belongs to the noisier side."""
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


def net() -> Any:
    return stirred(MODEL.build())


def test_each_sample_is_answered_by_the_network_of_its_time() -> None:
    out = net()(X, T, LABELS)
    for i, number in enumerate(NUMBERS):
        for k in range(3):
            alone = net()
            alone.net = alone.net.nets[k]
            same = torch.allclose(out[[i]], alone(X[[i]], T[[i]], LABELS[[i]]), atol=1e-6)
            assert same == (k == number)


def test_a_call_of_one_time_leaves_the_other_networks_alone() -> None:
    """They have no gradient at all, so that no optimiser moves them."""
    whole = net()
    out = whole(X, torch.tensor(0.4), LABELS)
    (out**2).sum().backward()
    moved = [[p.grad is not None for p in n.parameters()] for n in whole.net.nets]
    assert any(moved[1])
    assert not any(moved[0] + moved[2])
    torch.testing.assert_close(out, whole(X, torch.full((6,), 0.4), LABELS))


def test_a_traced_graph_gives_the_same() -> None:
    whole = net()
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(whole, (X, T, LABELS), dynamic_shapes=(batch,) * 3)
    for count in (6, 3):
        args = X[:count], T[:count], LABELS[:count]
        torch.testing.assert_close(program.module()(*args), whole(*args))


def test_whole_denoisers_and_mapped_conditions() -> None:
    class Whole(nn.Module):
        path = VE(0.1, 3.0)

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return self.factor * xt + cond["shift"]

    experts = ExpertsNet([Whole(1.0), Whole(3.0)], (0.35,))
    assert experts.path == VE(0.1, 3.0)
    shift = torch.arange(6.0).reshape(6, 1)
    factor = torch.tensor([1.0, 3.0, 1.0, 1.0, 3.0, 3.0]).reshape(6, 1)
    torch.testing.assert_close(experts(X, T, {"shift": shift}), factor * X + shift)
    at_once = experts(X, torch.tensor(0.2), {"shift": shift})
    torch.testing.assert_close(at_once, 3 * X + shift)


def test_bounds_that_do_not_decrease_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Experts\.bounds decrease, got \(0\.3, 0\.3\)"):
        Experts(MLP(), (0.3, 0.3))
