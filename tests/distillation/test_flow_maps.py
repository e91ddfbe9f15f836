"""Ladders of times, and the student as its own target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.distillation.flow_maps import (
    Ladder,
    huber_loss,
    jump,
    start_of,
    target_of,
    warmed_up,
)
from fewstep.distillation.method import Nets
from tests.instances import PATHS
from tests.quadrature import F64


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_ladder_leads_from_the_end_to_the_start(path: NoisePath) -> None:
    """On timesteps they are whole, and no more than there are."""
    times = Ladder(9).times(path, path.t_max)
    assert times[0] == path.t_min
    assert times[-1] == path.t_max
    assert times == sorted(set(times))
    assert len(times) == min(10, 4 if path.t_max == 3 else 10)
    assert not isinstance(path, VP) or all(t % 1 == 0 for t in times)


def test_published_ladders() -> None:
    """DDIM's fifty timesteps of Stable Diffusion; even times of a flow."""
    assert Ladder(50).times(VP(), 999.0) == [0.0, *(20.0 * i - 1 for i in range(1, 51))]
    assert Ladder(4).times(Flow(0.0), 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Ladder(2, rho=1.0).times(VE(), 2.002) == pytest.approx([0.002, 1.002, 2.002])
    assert start_of(FewStep(2.5, 4), VE()) == 2.5


def test_ladders_and_samplers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="steps >= 1 and rho > 0"):
        Ladder(0)
    with pytest.raises(ValueError, match="steps >= 1 and rho > 0"):
        Ladder(4, rho=0.0)
    with pytest.raises(ValueError, match="sampled by FewStep or Jumps"):
        start_of(Heun(), VE())


class Dropping(nn.Module):
    path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return nn.functional.dropout(torch.ones_like(xt), 0.5, self.training)


def test_the_same_units_drop_out_of_student_and_target() -> None:
    """Where the student is the target; the next pass has others."""
    nets = Nets({"student": Dropping()})
    x, t = torch.ones(3, 40, dtype=F64), torch.ones(3, dtype=F64)
    torch.manual_seed(0)
    with target_of(nets) as net:
        target = net(x, t)
    assert torch.equal(nets["student"](x, t), target)
    assert not torch.equal(nets["student"](x, t), target)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_boundary_is_exact(path: NoisePath) -> None:
    """X(x, t, t) = x for any network."""

    class Any7(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = path

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return 7 * xt + 3

    x, t = torch.linspace(-1, 1, 6, dtype=F64)[:, None], torch.full((6,), path.t_min, dtype=F64)
    assert torch.equal(jump(Any7(), x, t, t, None), x)
    assert not torch.equal(jump(Any7(), x, t + 1, t, None), x)


def test_a_warm_up_goes_from_nothing_to_all() -> None:
    assert [warmed_up(step, 4) for step in (0, 1, 3, 4, 9)] == [0, 0.25, 0.75, 1, 1]
    assert [warmed_up(step, 0) for step in (0, 9)] == [1, 1]


def test_the_huber_loss_by_hand() -> None:
    """(y^2 + c^2)^(1/2) - c of differences 3, 0 and -8, at c = 4 and 6; no gradient is logged."""
    made = torch.tensor([[4.0, 1.0], [1.0, -7.0]], dtype=F64, requires_grad=True)
    loss = huber_loss(made, torch.ones(2, 2, dtype=F64), 6.0)
    assert loss.total is not None
    expected = (45**0.5 - 6 + 0 + 0 + 4) / 4
    assert loss.total.item() == pytest.approx(expected)
    assert float(loss.logs["error"]) == pytest.approx((9 + 64) / 4)
    assert not loss.logs["error"].requires_grad
    four = huber_loss(made, torch.ones(2, 2, dtype=F64), 4.0).total
    assert four is not None
    assert four.item() == pytest.approx((1 + 80**0.5 - 4) / 4)
