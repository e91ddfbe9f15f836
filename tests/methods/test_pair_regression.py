"""Regression on pairs: the exact flow of a Gaussian is its zero, and no other map is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Nets
from fewstep.losses.distance import SquaredL2
from fewstep.methods.pair_regression import PairRegression
from tests.quadrature import F64, Line, batch, quantiles

A, B = 0.3, 0.5
"""Pairs y = 0.3 + 0.5 z."""


def loss(a: float, b: float, m: PairRegression) -> tuple[Loss, Line]:
    z = quantiles(4000)[:, None]
    student = Line(a, b)
    given = batch(2, pair_z=z, pair_x0=A + B * z)
    rollout = Rollout.at(0, m.sampler, "final")
    return m.student_loss(rollout, Nets({"student": student}), student, given), student


def gradient(found: tuple[Loss, Line]) -> list[float]:
    assert found[0].total is not None
    out: list[float] = found[1].gradient(found[0].total).tolist()
    return out


def value(found: tuple[Loss, Line]) -> float:
    assert found[0].total is not None
    return found[0].total.item()


def test_it_vanishes_at_the_teachers_flow() -> None:
    for m in (PairRegression(), PairRegression(distance=SquaredL2())):
        total = loss(A, B, m)[0].total
        assert total is not None
        assert total.item() < 1e-12


def test_values_by_hand() -> None:
    """y' - y = 0.1 + 0.2 z: squares 0.05 and slopes (0.2, 0.4); |z| has mean (2 / pi)^(1/2)."""
    squared = loss(A + 0.1, B + 0.2, PairRegression(distance=SquaredL2()))
    assert value(squared) == pytest.approx(0.05, rel=1e-6)
    assert gradient(squared) == pytest.approx([0.2, 0.4], rel=1e-6)
    absolute = loss(A, B + 0.2, PairRegression())
    assert value(absolute) == pytest.approx(0.2 * 0.7978846, rel=1e-3)
    assert gradient(absolute)[1] == pytest.approx(0.7978846, rel=1e-3)


def test_the_mirrored_student_has_the_same_law_and_is_pulled_back() -> None:
    found = loss(A, -B, PairRegression(distance=SquaredL2()))
    assert value(found) == pytest.approx(1.0, rel=1e-6)
    assert gradient(found)[1] == pytest.approx(-2.0, rel=1e-6)


def test_every_call_of_a_few_step_student_is_regressed_on_the_same_sample() -> None:
    """Each prediction in turn, of deterministic states that begin at the pairs' noise."""
    m = PairRegression(FewStep(2.5, 3, "ddim"))
    student = Line(A, 0.4)
    z = quantiles(50)[:, None]
    given = batch(2, pair_z=z, pair_x0=A + B * z)
    for k in (1, 2, 3):
        rollout = Rollout(m.sampler, k)
        total = m.student_loss(rollout, Nets({"student": student}), student, given).total
        expected = (m.sampler.part(k, student, z) - (A + B * z)).abs().mean()
        assert total is not None
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert {m.turns(step)[0].loss.args[0].k for step in range(20)} == {1, 2, 3}  # type: ignore[attr-defined]


def test_the_pairs_conditions_are_the_students() -> None:
    """Not those of the batch that carries them."""
    seen = []

    class Listening(Line):
        def forward(self, xt: Tensor, t: Tensor, cond: object = None) -> Tensor:
            seen.append(cond)
            return super().forward(xt, t)

    z, there = torch.ones(4, 1, dtype=F64), torch.arange(4)
    given = batch(2, pair_z=z, pair_x0=z, pair_cond=there)
    m = PairRegression()
    m.student_loss(Rollout(m.sampler, 1), Nets({"student": Listening(A, B)}), Line(A, B), given)
    assert seen == [there]


def test_fresh_noise_between_calls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PairRegression.sampler has noise 'ddim' or 'fixed'"):
        PairRegression(FewStep(2.5, 4))
    assert PairRegression(FewStep(2.5, 4, "fixed")).needs_pairs().count == 4096
