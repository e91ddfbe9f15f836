"""MSD on two classes N(+-1, 1/4) of one dimension, with students that do not hear labels.

At one noise level every score is p_c + k_c x_t, and a student is a + b z: two of them are the
classes exactly, one alone is between them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.msd import MSD
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.nets.routed import Routed
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.quadrature import F64, Even, Line

GRID = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)
LABELS = (GRID[:, 2] > 0).long()
MEANS = torch.tensor([-1.0, 1.0], dtype=F64)
LEVEL = Discrete((0.5,))
DRAWS = Even(torch.arange(8), noise=GRID[:, 1])
BATCH = Batch(GRID[:, :1], LABELS, MEANS[LABELS, None] + GRID[:, :1] / 2, DRAWS)


class Score(nn.Module):
    """p_c + k_c x_t for two labels."""

    path = VE()

    def __init__(self, p: Tensor, k: Tensor) -> None:
        super().__init__()
        self.p, self.k = nn.Parameter(p.clone()), nn.Parameter(k.clone())

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.p[cond, None] + self.k[cond, None] * xt


HALF = torch.tensor([0.5, 0.5], dtype=F64)
TEACHER = Score(MEANS / 2, HALF)


def source(draws: Draws) -> Batch:
    """All signs of z and eps for both labels, whatever is drawn."""
    return BATCH


def method(**more: Any) -> MSD:
    plain = {"times": LEVEL, "weight": Power(), "fake": FakeScore(LEVEL, Power()), **more}
    return MSD(FewStep(1.0), **plain)  # type: ignore[arg-type]


def trained(m: MSD, net: nn.Module, steps: int) -> State:
    optim = Optim(0.02, (0.5, 0.99))
    *_, last = train(m, TEACHER, net, source, batch=8, steps=steps, optim=optim)
    return last.state


def test_two_students_are_what_one_of_their_size_cannot_be() -> None:
    """Means and spreads; the teacher's are +-1 and 1/2."""
    two = trained(method(score_steps=0, ratio=2), Line(0.1, 0.3), 130).nets["student"]
    found = [(float(n.a), float(n.b)) for n in two.nets]
    assert found == [pytest.approx((mean, 0.5), abs=0.03) for mean in (-1.0, 1.0)]
    one = trained(method(students=1, score_steps=0, ratio=2), Line(0.1, 0.3), 60)
    (alone,) = one.nets["student"].nets
    assert abs(float(alone.a)) < 0.1


def test_score_matching_gives_each_student_its_labels_alone() -> None:
    """It ends at the teacher for them, and where it was for others; then it starts anew."""
    start = Score(torch.zeros(2, dtype=F64), HALF / 2)
    m = method(score_steps=120)
    assert [turn.net for turn in m.turns(119)] == ["student"]
    assert [turn.net for turn in m.turns(120)] == ["fake", "student"]
    restarted = {}
    for record in train(m, TEACHER, start, source, batch=8, steps=121, optim=Optim(0.02)):
        if record.restarted:
            restarted[record.step] = record.restarted
        if record.step == 120:
            for k, student in enumerate(record.state.nets["student"].nets):
                assert float(student.p[k]) == pytest.approx(float(MEANS[k]) / 2, abs=0.04)
                assert float(student.k[k]) == pytest.approx(0.5, abs=0.04)
                assert (float(student.p[1 - k]), float(student.k[1 - k])) == (0.0, 0.25)
    assert restarted == {120: ("student",)}


def test_the_loss_of_score_matching() -> None:
    """E |(p - p') + (k - k') x_t|^2, x_t of variance 1/4 + 1/4; zero for the teacher."""
    m = method()
    nets = m.init(TEACHER, Score(torch.zeros(2, dtype=F64), HALF / 2))
    expected = (0.5 + 0.25) ** 2 + 0.25**2 * 0.5
    assert m.score_loss(nets, TEACHER, BATCH).total.item() == pytest.approx(expected, rel=1e-12)
    assert m.score_loss(m.init(TEACHER, TEACHER), TEACHER, BATCH).total.item() == 0


def test_the_loss_is_of_blocks() -> None:
    """Labels of one student leave the other alone; without routing they do not: the control."""
    m = method()
    keep = LABELS == 1
    part = Batch(BATCH.z[keep], LABELS[keep], None, Even(torch.arange(4), noise=GRID[keep, 1]))
    *_, turn = m.turns(m.score_steps)
    slope = 0.3**2 / (0.3**2 + 0.25)
    law = Score(torch.full((2,), 0.1 * (1 - slope), dtype=F64), torch.full((2,), slope, dtype=F64))
    nets = Nets({"student": m.init(TEACHER, Line(0.1, 0.3))["student"], "fake": law})
    turn.loss(nets, TEACHER, part).total.backward()
    first, other = nets["student"].nets
    assert (float(first.a.grad), float(first.b.grad)) == (0, 0)
    # E (f_psi - f_phi) is 0.1 - 0.55 at x_t of mean 0.1, and its slope in z (k - 1/2) b.
    assert float(other.a.grad) == pytest.approx(0.1 - 0.55, rel=1e-12)
    assert float(other.b.grad) == pytest.approx((slope - 0.5) * 0.3, rel=1e-12)
    alone = method(students=1).init(TEACHER, Line(0.1, 0.3))
    turn.loss(Nets({"student": alone["student"], "fake": law}), TEACHER, part).total.backward()
    assert all(float(p.grad) != 0 for p in alone["student"].nets[0].parameters())


def test_the_result_is_described() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    m = MSD(students=4)
    assert m.result(model) == Model(Routed(MLP(16, 1), 4), (2,), 3)
    student: Any = m.init(model.build(), model.build())["student"]
    assert len({id(weight) for n in student.net.nets for weight in n.parameters()}) == 4 * len(
        list(student.net.nets[0].parameters())
    )
    made = student.state_dict()
    described = m.result(model).build().state_dict()
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in described.items()}


def test_what_does_not_fit_is_refused() -> None:
    changes: dict[str, Any]
    for changes in ({"students": 0}, {"score_steps": -1}):
        with pytest.raises(ValueError, match="MSD needs students >= 1 and score_steps >= 0"):
            MSD(**changes)
    net = Model(MLP(16, 1), (2,), 3).build()
    with pytest.raises(ValueError, match="as many as students: leave out --lora"):
        MSD().init(net, LoRA(2, targets=("inner",)).adapt(net))
