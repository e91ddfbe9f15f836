"""DMD: the KL gradient, the regression that knows which noise makes which picture, and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Nets
from fewstep.distillation.pictures import PictureFeatures, give_decoder
from fewstep.losses.weight import Power
from fewstep.methods.dmd import DMD
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line, batch, quantiles

SIGMA = 0.5
EXACT = (0.99375012, 0.49999023)
"""The exact flow from sigma 80 to the data N(1, 1/4): a + b z."""


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), VE())


def loss(a: float, b: float, regression: float) -> tuple[Loss, Line]:
    """At one noise level, against data N(1, 1/4) and pairs of the exact flow."""
    m = DMD(FewStep(80.0), Discrete((SIGMA,)), Power(2, -2), regression=regression)
    student = Line(a, b)
    z = quantiles(400).repeat_interleave(400)[:, None]
    pair = {"pair_z": z, "pair_x0": EXACT[0] + EXACT[1] * z}
    nets = Nets({"student": student, "fake": gaussian(a, b**2)})
    return m.student_loss(Rollout(m.sampler, 1), nets, gaussian(1.0, 0.25), batch(**pair)), student


def gradient(found: tuple[Loss, Line]) -> Tensor:
    assert found[0].total is not None
    return found[1].gradient(found[0].total)


def test_the_kl_part_is_the_gradient_of_kl() -> None:
    """The golden case: student 0.2 + 0.8 z, sigma 0.5."""
    found = gradient(loss(0.2, 0.8, 0.0))
    assert found[0] == pytest.approx(-1.6, abs=2e-3)
    assert found[1] == pytest.approx(0.7011236, abs=2e-3)


def test_the_regression_vanishes_at_the_exact_flow_alone() -> None:
    """There the whole gradient is that of KL: pairs start at N(0, 80^2), the data do not."""
    found, student = loss(*EXACT, 1.0)
    assert found.logs["regression"].item() < 1e-12
    assert gradient((found, student)).tolist() == pytest.approx([-0.0125, -1.95e-5], abs=1e-4)


def test_the_mirrored_student_has_the_same_law_and_not_the_same_pairs() -> None:
    """G(-z): no KL gradient, and a regression of 4 b^2, which pulls b up."""
    found, student = loss(EXACT[0], -EXACT[1], 0.25)
    assert found.logs["regression"].item() == pytest.approx(0.99996094, abs=1e-6)
    assert found.total is not None
    both = found.logs["score"] + 0.25 * found.logs["regression"]
    assert found.total.item() == pytest.approx(both.item(), rel=1e-12)
    assert float(gradient((found, student))[1]) < -0.4
    assert abs(float(gradient(loss(EXACT[0], -EXACT[1], 0.0))[1])) < 1e-4


@pytest.mark.parametrize(("regression", "sign"), [(0.0, -1), (0.25, 1)])
def test_descent_from_the_wrong_side(regression: float, sign: int) -> None:
    """From b = -0.4 the divergence alone ends at -1/2, with pairs at +1/2."""
    a, b = EXACT[0], -0.4
    for _ in range(60):
        step = gradient(loss(a, b, regression))
        a, b = a - 0.1 * float(step[0]), b - 0.1 * float(step[1])
    assert b == pytest.approx(sign * 0.5, abs=0.02)


class Call(Line):
    """The student of the first call, and something else at lower noise."""

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return super().forward(xt, t, cond) + (80.0 - t[:, None])


@pytest.mark.parametrize("k", [1, 2])
def test_of_several_calls_the_first_is_regressed(k: int) -> None:
    """Exact in the first call: the second, from fresh noise, has no part in the regression."""
    m = DMD(FewStep(80.0, 2), Discrete((SIGMA,)), Power(2, -2), regression=1.0)
    z = quantiles(50)[:, None].repeat_interleave(50, 0)
    pair = {"pair_z": z, "pair_x0": EXACT[0] + EXACT[1] * z}
    nets = Nets({"student": Call(*EXACT), "fake": gaussian(1.0, 0.25)})
    rollout = Rollout(m.sampler, k)
    found = m.student_loss(rollout, nets, gaussian(1.0, 0.25), batch(50, **pair))
    assert found.logs["regression"].item() < 1e-12


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DMD.regression is 0 or more, got -1"):
        DMD(regression=-1.0)


class Edges(PictureFeatures):
    """Two channels of a picture: it, and its difference to a constant."""

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        return (torch.cat([pictures, 1.5 - pictures], 1),)


def test_the_regression_may_be_on_decoded_pictures() -> None:
    """By hand: latents are decoded to twice their size, then compared by direction."""
    m = DMD(FewStep(80.0), Discrete((SIGMA,)), Power(2, -2), regression=1.0, distance=Edges())
    teacher = gaussian(1.0, 0.25)
    give_decoder(teacher, lambda x: 2 * x[:, :, None, None])
    z = quantiles(50)[:, None]
    pair = {"pair_z": z, "pair_x0": EXACT[0] + EXACT[1] * z}
    nets = Nets({"student": Line(0.2, 0.8), "fake": gaussian(0.2, 0.64)})
    found = m.student_loss(Rollout(m.sampler, 1), nets, teacher, batch(**pair))

    def direction(x: Tensor) -> Tensor:
        angle = torch.atan2(1.5 - 2 * x, 2 * x)
        return torch.cat([angle.cos(), angle.sin()], 1)

    apart = direction(0.2 + 0.8 * z) - direction(pair["pair_x0"])
    assert found.logs["regression"].item() == pytest.approx(
        float((apart**2).sum(1).mean()), rel=1e-6
    )
    with pytest.raises(ValueError, match="a loss on pictures needs"):
        m.student_loss(Rollout(m.sampler, 1), nets, gaussian(1.0, 0.25), batch(**pair))
