"""Forward passes of a step, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fewstep.compare.cost import Forwards, forwards, operations_of_a_forward
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import Ancestral, FewStep, Heun
from fewstep.distillation.pairs import Pairs
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd import DMD
from fewstep.methods.moment_matching import MomentMatching
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sfd import SFD
from fewstep.methods.sid import SiD
from fewstep.methods.tdm import TDM
from fewstep.nets.mlp import MLP
from fewstep.recipes.digits import digits
from fewstep.runs.run import Run


def small(method: object) -> Run:
    model = Model(MLP(width=256, blocks=8), shape=(1, 8, 8), classes=0)
    return replace(digits(), method=method, model=model, batch=8, steps=40)  # type: ignore[arg-type]


def a_sample(method: object) -> float:
    run = small(method)
    return forwards(run, run.model).step / run.batch


def test_the_forward_is_its_products() -> None:
    """An MLP by hand: two operations a weight."""
    model = Model(MLP(width=16, blocks=1), shape=(3,))
    weights = sum(p.numel() for p in model.build().parameters() if p.ndim == 2)
    assert operations_of_a_forward(model) == 2 * weights


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (Pretrain(sampler=Heun()), 3),  # one forward, its backward of two
        (DiffInstruct(), 9),  # fake: 1 + 3; student: 3 + two networks without a graph
        (MomentMatching(Ancestral(2.5, 2)), 10),  # auxiliary: 2 and 3; student: 3 and two others
        (SFD(FewStep(2.5, 1, "ddim")), 7),  # four steps of its teacher, and 3
        (SFD(FewStep(2.5, 1, "ddim"), solver="heun"), 10),  # seven calls for them
        (SiD(), 10),  # and the gradient through both, in the half of the MLP that reads x
    ],
)
def test_a_step_costs_what_one_counts_by_hand(method: object, passes: int) -> None:
    """Within 2 %: the first layer passes no gradient on; the last of SiD's is halved."""
    assert a_sample(method) == pytest.approx(passes, rel=0.02)


def test_calls_of_a_rollout_are_averaged() -> None:
    """Four calls: on average 1.5 more forward passes in each of two turns."""
    one, four = a_sample(DiffInstruct()), a_sample(DiffInstruct(sampler=FewStep(80.0, 4)))
    assert four - one == pytest.approx(2 * 1.5, abs=1.2)
    assert four > one + 1


def test_what_is_noised_anew_from_a_state_is_counted() -> None:
    """TDM in two calls: the fake score 1.5 + 3, the student 0.5 + 3 + 2, on average."""
    cost = a_sample(TDM(FewStep(2.5, 2, "ddim")))
    assert cost == pytest.approx(10, abs=1.1)


def test_pairs_are_counted_once() -> None:
    run = small(DMD(pairs=Pairs(100, Heun(steps=3))))
    cost = forwards(run, run.model)
    assert cost.before == 100 * 5
    assert cost.at(10) == cost.before + 10 * cost.step
    assert forwards(small(DMD(pairs=Pairs(100))), run.model, calls=35).before == 3500
    assert forwards(run, None).before == 0
    assert Forwards(2.0).at(3) == 6


def test_a_smaller_student_costs_less_of_its_teacher() -> None:
    run = small(DiffInstruct())
    wide = replace(run.model, net=MLP(width=512, blocks=8))
    assert forwards(run, wide).step < 0.7 * forwards(run, run.model).step
