"""DisBack: the path is recorded in order and walked back; each law on it is reached in turn.

One dimension, one noise level sigma = 1/2, a student x = b z. The law N(0, v) has the score of
slope v / (v + sigma^2) there, so that a slope is a law.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import FakeScore, Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.disback import DisBack
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.quadrature import F64, Even

SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 2)
BATCH = Batch(SIGNS[:, :1], None, None, Even(torch.arange(4), noise=SIGNS[:, 1]))
LEVEL = Discrete((0.5,))
START, TEACHER = 0.2, 0.5


class Slope(nn.Module):
    """c x_t, of the student at t = 1 and of scores at t = 1/2."""

    path = VE()

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.c * xt


def slope(variance: float) -> float:
    return variance / (variance + 0.25)


def method(**more: Any) -> DisBack:
    plain = {"times": LEVEL, "weight": Power(), "fake": FakeScore(LEVEL, Power()), **more}
    return DisBack(FewStep(1.0), **plain)  # type: ignore[arg-type]


def test_which_network_moves_and_what_is_followed() -> None:
    m = method(targets=2, record_steps=3, target_steps=4, ratio=2)
    assert m.recording == 9
    for step in range(9):
        assert [turn.net for turn in m.turns(step)] == ["fake"]
    followed = []
    for step in range(9, 22):
        *fakes, last = m.turns(step)
        assert [turn.net for turn in (*fakes, last)] == ["fake", "fake", "student"]
        followed.append(last.loss.args[1])  # type: ignore[attr-defined]
    assert followed == ["target2"] * 4 + ["target1"] * 4 + ["teacher"] * 5


def test_the_way_back_starts_at_the_smallest_gap() -> None:
    """Golden gaps of a path of even slopes; each is the student's gradient over -b."""
    m, last = method(targets=3), slope(START**2)
    path = [(1 - share) * TEACHER + share * last for share in (0.25, 0.5, 0.75)]
    kept = {f"target{k + 1}": Slope(c) for k, c in enumerate(path)}
    nets = Nets({"student": Slope(START), "fake": Slope(last), **kept})
    gaps = []
    for step in (m.recording + k * m.target_steps for k in range(4)):
        loss = m.turns(step)[-1].loss(nets, Slope(TEACHER), BATCH)
        (push,) = torch.autograd.grad(loss.total, nets["student"].parameters())
        gaps.append(float(push) / -START)
        apart = gaps[-1] ** 2 * (START**2 + 0.25)
        assert float(loss.logs["gap"]) == pytest.approx(apart, rel=1e-12)
    assert gaps == pytest.approx([0.0905, 0.181, 0.2716, 0.3621], abs=5e-5)
    assert m.turns(m.recording - 1)[-1].net == "fake"


def test_a_student_with_its_targets_law_rests() -> None:
    """And without it does not, whatever the teacher says: the control."""
    m = method(targets=1)
    rollout = Rollout(m.sampler, 1)
    for other, still in ((slope(START**2), True), (0.3, False)):
        nets = Nets({"student": Slope(START), "fake": Slope(slope(START**2))})
        nets["target1"] = Slope(other)
        loss = m.student_loss(rollout, "target1", nets, Slope(TEACHER), BATCH)
        (push,) = torch.autograd.grad(loss.total, nets["student"].parameters())
        assert (abs(float(push)) < 1e-15) == still


def test_the_whole_way() -> None:
    """Laws recorded from the teacher's to the student's, and each reached on the way back."""
    m = method(targets=3, record_steps=5, target_steps=50, ratio=2)
    state = State.init(m, Slope(TEACHER), Slope(START))
    seen: dict[int, float] = {}
    restarted = {}
    records = train(
        *(m, Slope(TEACHER), Slope(START), source),
        **{
            "batch": 4,
            "steps": m.recording + 200,
            "optim": Optim(0.02, (0.5, 0.99)),
            "state": state,
        },  # type: ignore[arg-type]
    )
    for record in records:
        seen[record.step] = float(record.state.nets["student"].c)
        if record.restarted:
            restarted[record.step] = record.restarted
    assert restarted == {m.recording: ("fake", "student")}
    assert {seen[step] for step in range(1, m.recording + 1)} == {START}
    kept = [TEACHER, *(float(state.nets[f"target{k}"].c) for k in (1, 2, 3)), slope(START**2)]
    assert kept == sorted(kept, reverse=True)
    assert min(a - b for a, b in pairwise(kept[:4])) > 0.02
    for number, c in enumerate((kept[3], kept[2], kept[1], TEACHER)):
        end = seen[m.recording + 50 * (number + 1)]
        assert slope(end**2) == pytest.approx(c, abs=0.01)
    assert seen[m.recording + 200] == pytest.approx(0.5, abs=0.01)


def source(draws: Draws) -> Batch:
    """The four pairs of signs, whatever is drawn."""
    return BATCH


@pytest.mark.parametrize("name", ["targets", "record_steps", "target_steps"])
def test_numbers_below_one_are_refused(name: str) -> None:
    changes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match="DisBack needs targets, record_steps and target_steps"):
        DisBack(**changes)
