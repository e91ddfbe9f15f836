"""sCM: the exact consistency function has no tangent, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow, coefficients
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.angular_tangent import Point
from fewstep.distillation.method import Nets
from fewstep.methods.scm import SCM
from tests.instances import PATHS, TEACHERS
from tests.quadrature import F64

each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
LAW = LogNormal(-0.5, 0.8)


class Ends(nn.Module):
    """f = mu + (lam / L_t)^(1/2) o along each axis: where the flow of a Gaussian ends."""

    def __init__(self, teacher: Any, power: float = 0.5) -> None:
        super().__init__()
        self.teacher, self.path, self.power = teacher, teacher.path, power
        self.size = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, sigma = coefficients(self.path, xt, t)
        mu, lam, basis = (
            x[0] for x in (self.teacher.means, self.teacher.variances, self.teacher.basis)
        )
        gain = (lam / (alpha**2 * lam + sigma**2)) ** self.power
        out: Tensor = mu + self.size * ((xt - alpha * mu) @ basis * gain) @ basis.T
        return out


def method(path: NoisePath, **settings: Any) -> SCM:
    start = path.t_max if path.t_max in (3.0, 999.0) else 0.95 * path.t_max
    return SCM(FewStep(start), LAW, **settings)


def scene(path: NoisePath, count: int = 100) -> tuple[Any, Batch]:
    """An exact teacher and data of its own law."""
    teacher: Any = TEACHERS["gaussian"](path)
    draws = Draws.range(0, count)
    mean, variance, basis = (x[0] for x in (teacher.means, teacher.variances, teacher.basis))
    x0 = mean + (draws.normal("data", (2,), F64) * variance.sqrt()) @ basis.T
    return teacher, Batch(x0, None, x0, draws)


@each_path
def test_the_exact_consistency_function_has_no_tangent(path: NoisePath) -> None:
    """And no loss; another function has one, and so has a warm-up that is not over."""
    teacher, batch = scene(path)
    m = method(path)
    at = m.point(path, teacher, batch)
    scale = m.tangent(teacher, at, 1.0).abs().mean().item()
    assert scale > 0.01
    assert m.tangent(Ends(teacher), at, 1.0).abs().max().item() < 1e-5 * scale
    assert m.tangent(Ends(teacher), at, 0.5).abs().mean().item() > 0.01
    assert m.tangent(Ends(teacher, 0.4), at, 1.0).abs().mean().item() > 0.01
    nets = m.init(teacher, Ends(teacher))
    found = m.student_loss(1.0, nets, teacher, batch)
    assert found.total is not None
    assert found.total.item() < 1e-6


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow()], ids=repr)
def test_the_published_tangent(path: NoisePath) -> None:
    """Equation 8 and algorithm 1 on TrigFlow's own coordinates, term by term, at any r."""
    teacher, batch = scene(path)
    m = method(path)
    at, sd, r = m.point(path, teacher, batch), m.sigma_data, 0.7
    student = Ends(teacher, 0.4)
    alpha, sigma = coefficients(path, at.xt, at.t)
    theta = torch.atan2(sigma, sd * alpha)
    scale = sd / (sd**2 * alpha**2 + sigma**2).sqrt()
    x, c, s = at.xt * scale, theta.cos(), theta.sin()
    v = (c * x - at.f) / s
    value, rate = torch.func.jvp(  # type: ignore[misc]
        lambda z, a: network_along(student, path, sd, z, a), (x, theta), (v * c * s, c * s)
    )
    published = -(c**2) * (value - v) - r * (c * s * x + rate)
    torch.testing.assert_close(m.tangent(student, at, r), published, rtol=1e-6, atol=1e-6)
    left_out = -(c**2) * (value - v) - r * rate
    assert (m.tangent(student, at, r) - left_out).abs().mean() > 0.02


def network_along(student: Any, path: NoisePath, sd: float, x: Tensor, theta: Tensor) -> Tensor:
    """s_d F = (cos theta x - f) / sin theta, f told x_t and t of the path at this angle."""
    if isinstance(path, VE):
        t = sd * theta.tan()
    elif isinstance(path, Flow):
        t = sd * theta.tan() / (1 + sd * theta.tan())
    else:
        t = torch.atan(sd * theta.tan())
    alpha, sigma = path.alpha(t), path.sigma(t)
    xt = x * (sd**2 * alpha**2 + sigma**2).sqrt() / sd
    out: Tensor = (theta.cos() * x - student(xt, t[:, 0])) / theta.sin()
    return out


def test_the_velocity_of_data_has_the_same_tangent_on_average() -> None:
    """It scatters around the teacher's; the mean over many of its products with x is the same."""
    teacher, batch = scene(Flow(), 100_000)
    student = teacher
    seen = []
    for velocity in ("teacher", "data"):
        m = method(Flow(), velocity=velocity)
        at = m.point(Flow(), teacher, batch)
        g = m.tangent(student, at, 1.0)
        seen.append(torch.stack([g.mean(0), (g * at.xt).mean(0), (g * at.t[:, None]).mean(0)]))
    assert (seen[0] - seen[1]).abs().max() < 0.01
    assert seen[0].abs().max() > 0.1


def test_the_tangent_is_normalised_over_a_sample() -> None:
    """By hand: F apart from itself by g / (|g| + c), over s_d tan theta."""
    path = VE()
    teacher, batch = scene(path)
    m = method(path, bins=0, c=0.3)
    student = Ends(teacher, 0.4)
    at = m.point(path, teacher, batch)
    g = m.tangent(student, at, 1.0)
    size = g.square().sum(1, keepdim=True).sqrt()
    loss = ((g / (size + 0.3)) ** 2).mean(1) / at.t
    found = m.student_loss(1.0, Nets({"student": student}), teacher, batch)
    assert found.total is not None
    torch.testing.assert_close(found.total.detach(), loss.mean())
    torch.testing.assert_close(found.logs["tangent"], size.mean())
    (slope,) = torch.autograd.grad(found.total, student.size)
    sine = (at.t / (0.25 + at.t**2).sqrt())[:, None]
    moved = -(student(at.xt, at.t) - teacher.means[0]) / (m.sigma_data * sine)
    by_hand = (-2 * (g / (size + 0.3)) * moved / at.t[:, None]).mean()
    torch.testing.assert_close(slope, by_hand.detach())  # toward F^- + g / (|g| + c)


def test_the_warm_up_is_a_function_of_the_step() -> None:
    shares = [SCM(warmup=10).turns(step)[0].loss.args[0] for step in (0, 5, 10, 20)]  # type: ignore[attr-defined]
    assert shares == [0.0, 0.5, 1.0, 1.0]
    assert SCM(warmup=0).turns(0)[0].loss.args == (1.0,)  # type: ignore[attr-defined]


def test_the_loss_is_of_one_size_at_all_levels() -> None:
    teacher, batch = scene(VE())
    m = method(VE(), bins=3)
    nets = m.init(teacher, Ends(teacher, 0.4))
    sums = m.student_loss(1.0, nets, teacher, batch).sums
    assert sums["count"].sum() == 100
    kept: Any = nets["level"]
    kept.follow(sums["count"], sums["total"], 0.9)
    found = m.student_loss(1.0, nets, teacher, batch).total
    assert found is not None
    assert found.item() == pytest.approx(1, rel=1e-5)


@each_path
def test_differences_in_place_of_forward_mode(path: NoisePath) -> None:
    teacher, batch = scene(path)
    at: Point = method(path).point(path, teacher, batch)
    forward, difference = (
        method(path, derivative=how).tangent(teacher, at, 1.0) for how in ("forward", "difference")
    )
    assert (difference - forward).abs().mean() < 2e-3 * forward.abs().mean()
    assert not torch.equal(difference, forward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data > 0"),
        ({"c": 0.0}, "c > 0"),
        ({"velocity": "student"}, "'teacher' or 'data'"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
        ({"velocity": "data", "kappa": 2.0}, "guides the teacher's velocity"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCM(**settings)
