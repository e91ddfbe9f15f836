"""ASD: n calls against n + 1 of a Gaussian student, at the optimal judge, and who moves when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, MultiStep
from fewstep.diffusion.time_distributions import Discrete, Karras
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.asd import ASD
from fewstep.teachers.gaussian import Gaussian
from tests.exact_judges import Exact
from tests.losses.test_adversarial_optima import STEP, A, B, X, gaussian
from tests.quadrature import F64, Line

S, LATER = 0.5, 1.25
"""The noise that is judged at, and the time of the second call, of N = 2."""
MEAN, VARIANCE = A + B * A / LATER, B**2 * (B**2 / LATER**2 + 1)
"""Of x^(2) = a + b (x^(1) + sigma eps) / sigma, for x^(1) = a + b z."""


def log_ratio(x: Tensor) -> Tensor:
    """log of the density of two calls over that of one, with noise."""
    q, p = gaussian(x, MEAN, VARIANCE + S**2), gaussian(x, A, B**2 + S**2)
    return q.log() - p.log()


class Fake(nn.Module):
    """The exact score of the first call, whose encoder features are x_t."""

    path = VE()
    feature_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.score = Gaussian(
            torch.tensor([A], dtype=F64), torch.tensor([[B**2]], dtype=F64), VE()
        )

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.score(xt, t)

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


TEACHER = Gaussian(torch.tensor([1.0], dtype=F64), torch.tensor([[0.25]], dtype=F64), VE())
JUDGE = Discriminator(Discrete((S,)), "frozen_fake", loss="relativistic", share_noise=False)
METHOD = ASD(FewStep(2.5, 2), Discrete((S,)), Power(2, -2), judge=JUDGE, alpha=1.0)
ONE, BOTH = Rollout(METHOD.sampler, 1), Rollout(METHOD.sampler, 2)


def scene(count: int = 100_000) -> tuple[Nets, Line, Batch]:
    student, draws = Line(A, B), Draws.range(0, count)
    nets = Nets({"student": student, "fake": Fake(), "discriminator": Exact(log_ratio)})
    return nets, student, Batch(draws.normal("z", (1,)).double(), None, None, draws)


def adversarial() -> list[float]:
    """E_p h (s_p - s_q) (1, E[z | x_t]) with h = E_{y of q} sigmoid(l_y - l), on a grid."""
    q, p = gaussian(X, MEAN, VARIANCE + S**2), gaussian(X, A, B**2 + S**2)
    inside = log_ratio(X)
    h = (q * (inside[None] - inside[:, None]).sigmoid()).sum(1) * STEP
    vp = B**2 + S**2
    push = p * h * ((X - MEAN) / (VARIANCE + S**2) - (X - A) / vp)
    return [float(push.sum() * STEP), float((push * B * (X - A) / vp).sum() * STEP)]


def test_one_call_follows_the_teacher_and_two_calls() -> None:
    """The gradient of KL, as recorded from an independent script, and the relativistic one.

    Four standard errors are 0.015. Without the last the first is left; a gradient through two
    calls, or to the wrong side, would be another.
    """
    nets, student, at = scene()
    loss = METHOD.student_loss(ONE, nets, TEACHER, at)
    assert loss.total is not None
    score = loss.logs["score"]
    assert student.gradient(score).tolist() == pytest.approx([-1.6, 0.7011236], abs=1.5e-2)
    found = student.gradient(loss.total - score).tolist()
    expected = adversarial()
    assert found == pytest.approx(expected, abs=6e-3)
    assert min(map(abs, expected)) > 0.05


def test_the_judge_rests_between_one_call_and_two() -> None:
    nets, _, at = scene()
    judge: Any = nets["discriminator"]
    for sign, still in ((1, True), (-1, False)):
        judge.optimum = lambda x, sign=sign: sign * log_ratio(x)
        total = METHOD.judge_loss(ONE, nets, TEACHER, at).total
        assert total is not None
        (slope,) = torch.autograd.grad(total, judge.scale)
        assert (abs(float(slope)) < 6e-3) if still else float(slope) > 0.05


def test_both_sides_have_noise_of_their_own() -> None:
    """And the one more call is the student's, of a ladder of the same times."""
    nets, student, at = scene(2000)
    more, x = METHOD.one_more(ONE, nets, at), ONE(nets, at)
    assert not more.requires_grad
    assert abs(float(torch.corrcoef(torch.cat([more, x], 1).T)[0, 1].detach())) < 0.07
    assert float(more.mean()) == pytest.approx(MEAN, abs=0.08)
    assert float(more.var()) == pytest.approx(VARIANCE, rel=0.1)
    assert at.draws is not None
    draws = at.draws.under("one more")
    expected = FewStep(2.5, 2)(student, draws.normal("z", (1,)).double(), None, draws)  # type: ignore[arg-type]
    torch.testing.assert_close(more, expected)


def test_after_the_last_call_the_teacher_is_alone() -> None:
    nets, _, at = scene(100)
    loss = METHOD.student_loss(BOTH, nets, TEACHER, at)
    assert set(loss.logs) == {"score"}
    assert torch.equal(loss.total, loss.logs["score"])  # type: ignore[arg-type]


def test_turns_and_heads() -> None:
    """n is drawn anew in each step, the same for all of its turns; every n but N has a head."""
    m = ASD(ratio=2)
    seen = set()
    for step in range(40):
        turns = m.turns(step)
        (rollout,) = {turn.loss.args[0] for turn in turns}  # type: ignore[attr-defined]
        names = ["fake", "fake", "discriminator", "student"]
        if rollout.k == 4:
            names.remove("discriminator")
        assert [turn.net for turn in turns] == names
        seen.add(rollout.k)
    assert seen == {1, 2, 3, 4}
    assert [(m.judge_of(n).heads, m.judge_of(n).head) for n in (1, 2, 3)] == [
        (3, 0),
        (3, 1),
        (3, 2),
    ]


def test_fewer_calls_are_the_first_ones() -> None:
    """As the module's text says: of the ladder's first times."""
    nets, student, at = scene(50)
    long = FewStep(2.5, 4)
    for n in (1, 2, 3):
        short = FewStep(times=tuple(long.ladder(VE())[:n]))
        expected = Rollout(long, n)(nets, at)
        torch.testing.assert_close(short(student, at.z, None, at.draws), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": FewStep(2.5)}, r"ASD.sampler makes two calls or more, each of which can be"),
        ({"sampler": MultiStep(Karras(), 4, "dpm++")}, r"ASD.sampler makes two calls or more"),
        ({"ratio": 0}, r"ASD.ratio is 1 or more, got 0"),
        ({"alpha": -0.1}, r"ASD.alpha is 0 or more, got -0.1"),
        ({"judge": Discriminator(features="own")}, r"ASD.judge reads the 'frozen_fake' score or"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASD(**change)
