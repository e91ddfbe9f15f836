"""PSO: where preferences of a Gaussian call end, what stops them, and whose likelihood it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Ancestral, FewStep
from fewstep.diffusion.types import Batch, Cond
from fewstep.distillation.method import Loss, Nets
from fewstep.distillation.pictures import give_decoder
from fewstep.eval.picture_networks import Ink
from fewstep.methods.pso import PSO
from tests.methods.test_rewarded import Slope
from tests.quadrature import F64

S = 0.4**0.5
"""sigma of the second call, so that v = 0.4 on VE."""
BETA = 2.0


class TwoCalls(nn.Module):
    """Predicts m where there is most noise, and keeps what it is given afterwards."""

    def __init__(self, m: float, path: NoisePath = VE()) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=F64))
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        alpha = self.path.alpha(t)[:, None]
        return torch.where(t[:, None] > 2, self.m.expand_as(xt), xt / alpha)


def pushed(m: float, labels: Any = "soft", low: float = 1e-9, high: float = 1e9) -> Loss:
    """The loss of a student at m, of a reference at 0 and a reward x; its gradient is in m."""
    sampler = FewStep(times=(3.0, S))
    method = PSO(sampler, reward=Slope(), beta=BETA, low=low, high=high, labels=labels)
    nets = Nets({"student": TwoCalls(m), "reference": TwoCalls(0.0).requires_grad_(False)})
    give_decoder(nets["reference"], lambda x: x[:, :, None, None])
    draws = Draws.range(0, 4000)
    batch = Batch(draws.normal("z", (1,), F64), None, None, draws)
    reference: Any = nets["reference"]
    found = method.turns(0)[0].loss(nets, reference, batch)
    assert found.total is not None
    found.total.backward()
    student: Any = nets["student"]
    return found._replace(sums={"gradient": student.m.grad})


def test_soft_labels_end_where_the_reward_and_the_reference_balance() -> None:
    """m_ref + v c / beta, to rounding: there the preference is the label's for every pair."""
    best = S**2 / BETA
    assert float(pushed(best).sums["gradient"].abs()) < 1e-7
    assert float(pushed(best - 0.1).sums["gradient"]) < -1e-3
    assert float(pushed(best + 0.1).sums["gradient"]) > 1e-3


def test_hard_labels_have_no_end() -> None:
    """The control: still pushed at ten times the distance."""
    for distance in (1.0, 10.0):
        assert float(pushed(distance * S**2 / BETA, "hard").sums["gradient"]) < -1e-4


def test_the_ratio_that_has_left_its_range_is_not_pushed() -> None:
    """Far from the reference all ratios have; beside it none."""
    far, near = pushed(30.0, "hard", 0.9, 1.1), pushed(1e-6, "hard", 0.9, 1.1)
    assert float(far.sums["gradient"]) == 0.0
    assert float(far.logs["clipped"]) == 1.0
    assert float(near.logs["clipped"]) == 0.0
    assert float(near.sums["gradient"]) < -0.1
    some = pushed(0.1, "hard", 0.9, 1.1)
    assert 0.1 < float(some.logs["clipped"]) < 0.9
    assert float(pushed(0.1, "hard").sums["gradient"]) != float(some.sums["gradient"])


def test_calls_before_the_last_are_trained_all_in_time() -> None:
    method = PSO(reward=Ink())
    seen = {turn.loss.args[1] for step in range(40) for turn in method.turns(step)}  # type: ignore[attr-defined]
    assert seen == {1, 2, 3}


def test_what_has_no_likelihood_is_refused() -> None:
    for sampler in (FewStep(2.5), FewStep(2.5, 4, "ddim"), Ancestral(2.5, 4)):
        with pytest.raises(ValueError, match=r"^PSO.sampler is a FewStep of 2 calls or more with"):
            PSO(sampler, reward=Ink())
    with pytest.raises(ValueError, match=r"^Preference needs beta > 0 and low < 1 < high, got 0"):
        PSO(reward=Ink(), beta=0.0)
    with pytest.raises(ValueError, match=r"^PSO.labels is 'hard' or 'soft', got 'x'"):
        PSO(reward=Ink(), labels="x")  # type: ignore[arg-type]
