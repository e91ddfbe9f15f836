"""LADD: the generator's gradient at the optimal judge, the judge's rest, and who is fed what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.methods.ladd import LADD
from tests.exact_judges import Exact, Glass, judged
from tests.losses.test_adversarial_optima import MU, OPTIMUM, A, B, V, log_ratio
from tests.quadrature import F64, Line, batch

S = 0.5


def at_level(loss: Any, s: float = S) -> LADD:
    return LADD(judge=Discriminator(Discrete((s,)), loss=loss))


def gradient(loss: str, s: float) -> Tensor:
    """Of a student with mean A and deviation B; the teacher's samples are N(MU, V)."""
    m, student = at_level(loss, s), Line(A, B)
    nets = judged(student, lambda x: OPTIMUM[loss](log_ratio(x, s).exp()))
    at = batch(300)
    at = at._replace(more={"pair_z": at.z, "pair_x0": MU + V**0.5 * at.z})
    total = m.student_loss((), nets, Glass(), at).total
    assert total is not None
    return student.gradient(total)


@pytest.mark.parametrize(
    ("loss", "s", "golden"),
    [
        ("nonsaturating", 0.5, (-1.1566796, 0.7492063)),
        ("least_squares", 0.5, (-0.3024243, 0.0653634)),
        ("nonsaturating", 2.5, (-0.0647910, 0.0065978)),
    ],
)
def test_the_students_gradient_is_score_distillation(
    loss: str, s: float, golden: tuple[float, float]
) -> None:
    """E h(r) (s_p - s_q) dx, recorded from an independent script."""
    assert gradient(loss, s).tolist() == pytest.approx(golden, rel=2e-2, abs=2e-4)


def rest(m: LADD, generated: tuple[float, float], real: tuple[float, float]) -> float:
    """The judge's slope at the optimum for generated N(A, B^2) and real N(MU, V)."""
    nets = judged(Line(*generated), lambda x: log_ratio(x, S))
    at = batch(300)
    at = at._replace(more={"pair_z": at.z, "pair_x0": real[0] + real[1] * at.z})
    total = m.judge_loss((), nets, Glass(), at).total
    judge: Any = nets["discriminator"]
    assert isinstance(judge, Exact)
    assert total is not None
    return judge.unrest(total)


def test_the_judge_rests_at_the_density_ratio() -> None:
    """And not where real and generated are swapped, or both are the student's."""
    m, data = at_level("nonsaturating"), (MU, V**0.5)
    assert rest(m, (A, B), data) < 2e-3
    assert rest(m, data, (A, B)) > 0.3
    assert rest(m, (A, B), (A, B)) > 0.1


class Listening(Line):
    """It notes what it is called with."""

    def __init__(self) -> None:
        super().__init__(A, B)
        self.calls: list[tuple[Tensor, Tensor, Any]] = []

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.calls.append((xt, t, cond))
        return super().forward(xt, t)


def test_the_student_is_fed_with_the_teachers_samples() -> None:
    """Noised at the times of its calls, with their conditions; both sides alike."""
    m = LADD(FewStep(2.0, 2), judge=Discriminator(Discrete((S,))))
    draws = Draws.range(0, 40)
    z, x0 = draws.normal("z", (1,), F64), draws.normal("x0", (1,), F64)
    there, here = torch.arange(40), torch.zeros(40)
    more = {"pair_z": -z, "pair_x0": x0, "pair_cond": there}
    student, given = Listening(), Batch(z, here, x0 + 9, draws, more)
    nets = judged(student, lambda x: x)
    for turn in m.turns(0):
        turn.loss(nets, Glass(), given)
    assert len(student.calls) == 2
    for xt, t, cond in student.calls:
        assert set(t.tolist()) == {1.0, 2.0}
        expected = torch.where(t[:, None] == 2.0, 2.0 * z, x0 + z)
        torch.testing.assert_close(xt, expected)
        assert cond is there


def test_real_and_generated_have_one_noise() -> None:
    """A student that returns the teacher's samples cannot be told: both logits are the same."""

    draws = Draws.range(0, 30)
    z, x0 = draws.normal("z", (1,), F64), draws.normal("x0", (1,), F64)

    class Copying(Line):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return x0 + 0 * self.a

    student = Copying(A, B)
    given = Batch(z, None, None, draws, {"pair_z": z, "pair_x0": x0})
    m = at_level("relativistic")
    nets = judged(student, lambda x: x**3)
    for turn in m.turns(0):
        total = turn.loss(nets, Glass(), given).total
        assert total is not None
        assert float(total.detach()) == pytest.approx(0.6931472, rel=1e-6)


def test_shares_change_after_the_early_steps() -> None:
    """The published schedule, four calls from pure noise."""
    late, soon = (0.7, 0.1, 0.1, 0.1), (0.0, 0.0, 0.5, 0.5)
    m = LADD(FewStep(times=(1.0, 0.75, 0.5, 0.25)), shares=late, early_shares=soon, early=500)
    for step, shares in ((0, soon), (499, soon), (500, late)):
        turns = m.turns(step)
        assert [turn.net for turn in turns] == ["discriminator", "student"]
        assert [turn.rate for turn in turns] == [1.0, 0.1]
        assert all(turn.loss.args == (shares,) for turn in turns)  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LADD.early_shares has a share of each of the sampler"):
        LADD(early_shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"LADD.rate is above 0, got 0"):
        LADD(rate=0.0)
    with pytest.raises(ValueError, match=r"LADD.sampler is a FewStep"):
        LADD(Jumps(2.5))
    with pytest.raises(ValueError, match=r"its judge reads the 'teacher' or a network of its"):
        LADD(judge=Discriminator(features="fake", pool="channels"))
    assert LADD().needs_pairs().count == 4096
    assert LADD().noise_levels(Glass.path) == LADD().judge.times
