"""Where the fake score starts when a student is adapted to another teacher, on Gaussians.

Base N(0, 1/4), new teacher N(1, 1/2), and the exact one-step student of the base. Golden gradients
are those of KL(student || new teacher) at the noise level t,

    d/da = (a - m') / (V' + t^2),    d/db = (1 / (V' + t^2) - 1 / (b^2 + t^2)) b.
"""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line, batch

T = 1.0
NEW = (1.0, 0.5)


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), VE())


def gradient(a: float, b: float, fake: tuple[float, float]) -> list[float]:
    """Of the student's turn, with a fake score of this mean and variance."""
    m = DiffInstruct(FewStep(2.5), Discrete((T,)), Power(2, -2))
    student = Line(a, b)
    nets = Nets({"student": student, "fake": gaussian(*fake)})
    loss = m.student_loss(Rollout(m.sampler, 1), nets, gaussian(*NEW), batch())
    assert loss.total is not None
    return student.gradient(loss.total).tolist()


def kl(a: float, b: float) -> list[float]:
    mean, variance = NEW
    slope = 1 / (variance + T**2) - 1 / (b**2 + T**2)
    return [(a - mean) / (variance + T**2), slope * b]


def test_the_base_is_the_fake_score_of_an_exact_student() -> None:
    """So the first direction is that of KL; with the new teacher in its place it is zero."""
    assert gradient(0.0, 0.5, (0.0, 0.25)) == pytest.approx(kl(0.0, 0.5), abs=2e-3)
    assert gradient(0.0, 0.5, NEW) == pytest.approx([0.0, 0.0], abs=1e-12)


def test_a_fake_score_that_stays_at_the_base_never_stops() -> None:
    """At the goal it still pushes by (m - m') / (V + t^2) = -0.8; one that learns ends there."""
    a, b = NEW[0], NEW[1] ** 0.5
    assert gradient(a, b, (0.0, 0.25))[0] == pytest.approx(-0.8, abs=0.05)
    assert gradient(a, b, NEW) == pytest.approx([0.0, 0.0], abs=1e-12)
    a, b = 0.0, 0.5
    for _ in range(150):
        step = gradient(a, b, (a, b**2))
        a, b = a - 1.5 * step[0], b - 1.5 * step[1]
    assert (a, b) == pytest.approx((1.0, 0.5**0.5), abs=5e-3)
