"""BOOT: bootstrapped from noise, a Gaussian's student makes the teacher's own small steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.methods.boot import BOOT
from fewstep.teachers.gaussian import Gaussian
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.quadrature import F64, Even

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.45),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


def scene(name: str, count: int = 100) -> tuple[Any, GaussianFlowMap, Batch, Any]:
    path, start = STARTS[name]
    teacher: Any = TEACHERS["gaussian"](path)
    draws = Draws.range(0, count)
    batch = Batch(draws.normal("z", (2,), F64), None, None, draws)
    return teacher, GaussianFlowMap(teacher), batch, BOOT(Jumps(start))


def at_most(x: Tensor) -> float:
    return float(x.abs().max())


@each_path
def test_a_step_of_the_signal_is_a_step_of_the_teacher(name: str) -> None:
    """From the student's own x_t, whatever it is: ddim(x_T, y_s, T, s) is ddim(x_t, f, t, s)."""
    teacher, exact, batch, m = scene(name)
    path = teacher.path

    def student(xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
        return exact(xt, t, s=s) + 0.3

    at = m.bootstrap(student, teacher, batch)
    draws: Any = batch.draws
    low = path.flow_time(torch.tensor(path.t_min, dtype=F64))
    top = path.flow_time(at.T)
    u = draws.uniform("t").to(F64)
    t = path.time_of(low + (top - low) * (31 * u + 1) / 32)
    xt = path.ddim(at.xT, student(at.xT, at.T, s=t), at.T, t)
    stepped = path.ddim(xt, teacher(xt, t), t, at.s)
    torch.testing.assert_close(path.ddim(at.xT, at.ys, at.T, at.s), stepped, rtol=1e-6, atol=1e-7)
    assert at_most(exact.jump(at.xT, at.T, at.s) - stepped) > 1e-2


@each_path
def test_many_small_steps_have_the_flow_map_as_their_fixed_point(name: str) -> None:
    """Of first order in the length of a step, in the error divided by that length."""
    teacher, exact, batch, m = scene(name)
    errors = []
    for steps in (100, 200, 1600):
        found = BOOT(m.sampler, steps).bootstrap(exact, teacher, batch)
        y = exact(found.xT, found.T, s=found.s)
        errors.append(at_most((found.ys - y) / found.change))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[2] < 0.05
    assert BOOT(m.sampler, 1600, boundary=1.0) == BOOT(m.sampler, 1600)
    nets = Nets({"student": exact})
    logs = BOOT(m.sampler, 1600).student_loss(nets, teacher, batch).logs
    assert float(logs["boundary"]) < 1e-12


class Table(nn.Module):
    """y = c(s) x_T with a free number c for each s that it was told."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path, self.table = path, dict[float, float]()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
        return xt * self.table[round(float(s[0]), 9)]


@each_path
def test_a_student_that_fits_every_target_is_the_product_of_the_steps(name: str) -> None:
    """From the boundary at T down: the signal at t_min is that of the teacher's 8 DDIM steps."""
    path, start = STARTS[name]
    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)
    student, m = Table(path), BOOT(Jumps(start), steps=8)
    T, z = torch.tensor([start], dtype=F64), torch.ones(1, 1, dtype=F64)
    xT = perturb(path, 0 * z, z, T)
    student.table[round(start, 9)] = float(teacher(xT, T) / xT)
    times = []
    for k in reversed(range(8)):
        batch = Batch(z, None, None, Even(torch.arange(1), noise=z, share=k / 7))
        at = m.bootstrap(student, teacher, batch)
        student.table[round(float(at.s), 9)] = float(at.ys / at.xT)
        times.append(float(at.s))
    x, t = xT, T
    for time in times:
        s = torch.tensor([time], dtype=F64)
        x, t = path.ddim(x, teacher(x, t), t, s), s
    made = path.ddim(xT, student(xT, T, s=t), T, t)
    torch.testing.assert_close(made, x, rtol=1e-7, atol=1e-9)
    assert times[-1] == pytest.approx(path.t_min, abs=1e-6)
    one_step = path.ddim(xT, teacher(xT, T), T, t)
    assert at_most(one_step - x) > 0.02


def test_the_change_is_the_ratio_of_signal_to_noise_where_the_start_is_noise() -> None:
    """Golden: 1 - (sigma_s / alpha_s) / (sigma_t / alpha_t); all of it at t = T."""
    path, m = Flow(), BOOT(Jumps(1.0))
    T, t, s = (torch.tensor([u], dtype=F64) for u in (1.0, 0.6, 0.5))
    (alpha, sigma), (alpha_s, sigma_s) = (coefficients(path, u[:, None], u) for u in (t, s))
    expected = 1 - sigma_s * alpha / (sigma * alpha_s)
    assert float(m.change(path, T, t, s)) == pytest.approx(float(expected), rel=1e-12)
    assert float(m.change(path, T, T, s)) == 1.0
    assert float(m.change(VE(), 2.5 * T, 2.5 * T, s)) == pytest.approx(1.0)


def test_the_loss_by_hand() -> None:
    """The bootstrap over its length squared, and the boundary with its weight."""
    teacher, exact, batch, _ = scene("ve", 20)

    class Off(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
            return exact(xt, t, s=s) + 0.1

    student = Off()
    m = BOOT(boundary=3.0)
    at = m.bootstrap(student, teacher, batch)
    made = student(at.xT, at.T, s=at.s)
    own = float((((made - at.ys) / at.change) ** 2).mean())
    found = m.student_loss(Nets({"student": student}), teacher, batch)
    assert found.total is not None
    assert float(found.total) == pytest.approx(own + 3 * 0.01, rel=1e-9)
    alone = BOOT(boundary=0.0).student_loss(Nets({"student": student}), teacher, batch).total
    assert alone is not None
    assert float(alone) == pytest.approx(own, rel=1e-12)


def test_settings_that_mean_nothing_are_refused() -> None:
    for sampler in (Jumps(2.5, 2), FewStep(2.5)):
        with pytest.raises(ValueError, match="is a Jumps of one call"):
            BOOT(sampler)
    with pytest.raises(ValueError, match="steps of 1 or more"):
        BOOT(steps=0)
