"""ADD: the distillation term in closed form, hinge by hand, who is fed what, pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import PictureFeatures, give_decoder
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.weight import Power
from fewstep.methods.add import ADD
from tests.exact_judges import Exact, judged
from tests.losses.test_adversarial_optima import MU, OPTIMUM, A, B, V, log_ratio
from tests.quadrature import F64, Line, batch

S = 2.5
SHRINKS = 1 - V / (V + S**2)


class Teacher(nn.Module):
    """The exact denoiser of N(MU, V), whose encoder features are x_t."""

    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.seen.append(xt)
        return MU + (1 - SHRINKS if float(t[0]) == S else V / (V + t[:, None] ** 2)) * (xt - MU)

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


def method(**change: Any) -> ADD:
    judge = Discriminator(None, loss="hinge")
    return replace(ADD(judge=judge, times=Discrete((S,)), distil=1.0), **change)


def terms(m: ADD, a: float, b: float, optimum: Any) -> tuple[list[float], list[float]]:
    """(d/da, d/db) of the adversarial and of the distillation term."""
    student, teacher, at = Line(a, b), Teacher(), batch(200)
    at = at._replace(x0=MU + V**0.5 * at.z)
    loss = m.student_loss(judged(student, optimum), teacher, at)  # type: ignore[arg-type]
    assert loss.total is not None
    pulled = student.gradient(loss.logs["distillation"])
    rest = student.gradient(loss.total) - m.distil * pulled
    return rest.tolist(), pulled.tolist()


@pytest.mark.parametrize(("a", "b"), [(A, B), (MU, V**0.5), (MU, 0.0)])
def test_the_distillation_term_shrinks(a: float, b: float) -> None:
    """2 (1 - k) (a - mu) and 2 (1 - k) b: 0.96 at the data's own law, zero at its mean alone."""
    _, pulled = terms(method(), a, b, lambda x: x)
    expected = [2 * SHRINKS * (a - MU), 2 * SHRINKS * b]
    assert pulled == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if b == V**0.5:
        assert pulled[1] == pytest.approx(0.9615, abs=1e-4)


def test_its_weight() -> None:
    """c at the noise level of the term; on EDM's path alpha is one."""
    (_, plain), (_, scaled) = (
        terms(method(weight=weight), A, B, lambda x: x) for weight in (Power(1, 0), Power(0, -1))
    )
    assert scaled == pytest.approx([value / S for value in plain])


def test_hinge_by_hand() -> None:
    """-D has the slope of D: of 3 x + x^2 at a + b z, (3 + 2 a, 2 b), and twice the weight."""
    rest, pulled = terms(method(distil=2.0), A, B, lambda x: 3 * x + x**2)
    assert rest == pytest.approx([-(3 + 2 * A), -2 * B], rel=1e-6)
    assert pulled == pytest.approx([2 * SHRINKS * (A - MU), 2 * SHRINKS * B], rel=1e-6)


def test_at_the_optimal_judge() -> None:
    """Golden, with noise of 0.5: the gradient of the nonsaturating loss."""
    judge = Discriminator(Discrete((0.5,)))
    rest, _ = terms(method(judge=judge), A, B, lambda x: log_ratio(x, 0.5))
    assert rest == pytest.approx([-1.1566796, 0.7492063], rel=1e-2)


def test_the_judge_rests_between_data_and_samples() -> None:
    """And not with the two swapped."""
    m = method(judge=Discriminator(Discrete((0.5,)), loss="least_squares"))
    for swapped in (False, True):
        student = Line(MU, V**0.5) if swapped else Line(A, B)
        nets = judged(student, lambda x: OPTIMUM["least_squares"](log_ratio(x, 0.5).exp()))
        at = batch(300)
        at = at._replace(x0=A + B * at.z if swapped else MU + V**0.5 * at.z)
        total = m.judge_loss(nets, Teacher(), at).total  # type: ignore[arg-type]
        judge: Any = nets["discriminator"]
        assert isinstance(judge, Exact)
        assert total is not None
        slope = judge.unrest(total)
        assert slope > 0.1 if swapped else slope < 2e-3


def test_the_student_denoises_data_and_the_teacher_the_student() -> None:
    """At the student's times, the first from pure noise; the teacher at samples with noise."""
    calls: list[tuple[Tensor, Tensor]] = []

    class Listening(Line):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            calls.append((xt, t))
            return super().forward(xt, t)

    m = method(sampler=FewStep(2.0, 2), shares=(0.2, 0.8))
    draws = Draws.range(0, 400)
    z, x0 = draws.normal("z", (1,), F64), draws.normal("x0", (1,), F64)
    teacher, student = Teacher(), Listening(A, B)
    nets = judged(student, lambda x: x)
    for turn in m.turns(0):
        turn.loss(nets, teacher, Batch(z, None, x0, draws))  # type: ignore[arg-type]
    assert len(calls) == 2
    for xt, t in calls:
        torch.testing.assert_close(xt, torch.where(t[:, None] == 2.0, 2.0 * z, x0 + z))
        assert float((t == 2.0).double().mean()) == pytest.approx(0.2, abs=0.08)
    (seen,) = teacher.seen
    assert not seen.requires_grad
    noise = draws.under("distillation").normal("eps", (1,)).double()
    torch.testing.assert_close(
        seen, (A + B * calls[0][0] / calls[0][1][:, None] + S * noise).detach()
    )


def test_pictures_are_compared_decoded() -> None:
    """A decoder that doubles makes the squares four times as large."""
    losses = []
    for decoded in (False, True):
        teacher: Any = Teacher()
        teacher.forward = lambda xt, t, cond=None: 0 * xt
        teacher.encode = lambda xt, t, cond=None: xt.flatten(1)[:, :1]
        give_decoder(teacher, lambda x: 2 * x)
        draws = Draws.range(0, 6)
        z = draws.normal("z", (1, 4, 4), F64)
        student: Any = nn.Identity()
        nets = Nets({"student": student, "discriminator": Exact(lambda x: x)})
        student.forward = lambda xt, t, cond=None: xt
        m = method(pictures=decoded)
        losses.append(m.student_loss(nets, teacher, Batch(z, None, z, draws)).logs["distillation"])
    assert float(losses[1] / losses[0]) == pytest.approx(4.0)


class Squares(PictureFeatures):
    """The squares of a picture's halves, as vectors."""

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        return [half.flatten(1) ** 2 for half in pictures.chunk(2, 3)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(8,), (8,)]


def test_a_judge_of_pictures() -> None:
    """Heads on the features of decoded samples, which have no noise; trained alone."""
    features = Squares()
    judge = Discriminator(
        None, features, loss="hinge", penalty=GradientPenalty(0.1, of="features")
    )
    m, teacher = method(judge=judge), Teacher()
    give_decoder(teacher, lambda x: x / 2)
    student: Any = nn.Linear(1, 1).double()
    student.forward = lambda xt, t, cond=None: xt * student.weight
    nets = m.init(teacher, student)  # type: ignore[arg-type]
    made: Any = nets["student"]
    made.forward = lambda xt, t, cond=None: xt * made.weight
    draws = Draws.range(0, 6)
    z, x0 = draws.normal("z", (1, 4, 4), F64), draws.normal("x0", (1, 4, 4), F64)
    at = Batch(z, None, x0, draws)
    heads: Any = nets["discriminator"]
    assert len(heads.heads) == 2
    teacher.forward = lambda xt, t, cond=None: xt  # type: ignore[method-assign]
    loss = m.student_loss(nets, teacher, at)  # type: ignore[arg-type]
    x = 2.5 * z * made.weight
    by_hand = [
        head(half.flatten(1) ** 2)
        for head, half in zip(heads.heads, (x / 2).chunk(2, 3), strict=True)
    ]
    torch.testing.assert_close(loss.logs["gan_loss"], -torch.cat(by_hand, 1).mean())
    found = m.judge_loss(nets, teacher, at).total  # type: ignore[arg-type]
    assert found is not None
    (slope,) = torch.autograd.grad(found, heads.heads[0].layers[0].weight)
    assert float(slope.abs().max()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": Jumps(2.5)}, r"ADD.sampler is a FewStep, as its calls are trained on noised"),
        ({"shares": (0.5, 0.5)}, r"ADD.shares has a share of each of the sampler's 1 calls"),
        ({"judge": Discriminator(features="frozen_fake")}, r"ADD has no fake score, so its judge"),
        ({"distil": -1.0}, r"ADD.distil is 0 or more, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADD(**change)
