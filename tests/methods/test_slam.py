"""SLAM: from every point of a teacher's step the end is that of the step's end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, WithInput
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder, Pair, solve
from fewstep.distillation.method import Nets
from fewstep.methods.slam import SLAM
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from tests.instances import TEACHERS
from tests.methods.test_battery import stirred
from tests.quadrature import F64

LAM = 0.25
STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 0.98),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


def method(name: str, steps: int = 8, **settings: Any) -> SLAM:
    plain: dict[str, Any] = {"decay": 0.0}
    sampler = WithInput(FewStep(STARTS[name][1]), "gamma", 1.0)
    return SLAM(sampler, Ladder(steps), **(plain | settings))


class Products(nn.Module):
    """On N(0, 1/4) the g with which X(x_gamma, t, s; gamma) is the product of steps from x_u.

    `shift` is added to gamma: at 0 it is where it is told to be.
    """

    def __init__(self, m: SLAM, path: NoisePath, shift: float = 0.0, size: float = 1.0) -> None:
        super().__init__()
        self.m, self.path, self.shift = m, path, shift
        self.size = nn.Parameter(torch.tensor(size, dtype=F64))
        sampler: Any = m.sampler
        self.times = torch.tensor(m.ladder.times(path, sampler.sampler.t_init), dtype=F64)
        alpha, sigma = path.alpha(self.times), path.sigma(self.times)
        f = alpha * LAM / (alpha**2 * LAM + sigma**2)
        ratio = sigma[:-1] / sigma[1:]
        self.steps = ratio + (alpha[:-1] - ratio * alpha[1:]) * f[1:]
        self.gains = torch.cat([torch.ones(1, dtype=F64), self.steps.cumprod(0)])

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, gamma: Tensor) -> Tensor:
        n = (self.times - t[:, None]).abs().argmin(1)
        n = n.clamp(min=1)
        now, below, end = self.times[n], self.times[n - 1], self.times[:1]
        (alpha, sigma), (alpha_u, sigma_u), (alpha_s, sigma_s) = (
            (self.path.alpha(u), self.path.sigma(u)) for u in (now, below, end)
        )
        share, ratio = gamma + self.shift, alpha / alpha_u
        factor = share + (1 - share) * ratio * self.steps[n - 1]  # x_gamma of x_t
        gain = self.size * self.gains[n] / factor  # X of x_gamma
        low = ratio * sigma_u
        level = share * sigma + (1 - share) * low
        if self.m.noise == "independent":
            level = (low**2 + share**2 * (sigma**2 - low**2)).sqrt()
        x0 = (gain - sigma_s / level) / (alpha_s - sigma_s / level * alpha)
        x0 = torch.where((alpha_s - sigma_s / level * alpha).abs() > 1e-12, x0, 0.0)
        g = (1 - sigma / level * (1 - alpha * x0)) / alpha
        return g[:, None] * xt  # type: ignore[no-any-return]


def scene(name: str, count: int = 200) -> tuple[Any, Batch]:
    draws = Draws.range(0, count)
    x0 = 0.5 * draws.normal("x0", (1,), F64)
    path = STARTS[name][0]
    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[LAM]], dtype=F64), path)
    return teacher, Batch(x0, None, x0, draws)


@each_path
@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_the_product_of_the_steps_is_the_fixed_point(name: str, noise: Any) -> None:
    """Loss and gradient zero, for all gamma; not for a student that mistakes gamma."""
    m = method(name, noise=noise)
    teacher, batch = scene(name)
    path = teacher.path

    def loss(student: nn.Module) -> Tensor:
        total = m.student_loss(Nets({"student": student}), teacher, batch).total
        assert total is not None
        return total

    student = Products(m, path)
    assert float(loss(student).detach()) < 1e-10
    (slope,) = torch.autograd.grad(loss(student), student.size)
    assert abs(float(slope)) < 1e-7
    for wrong in (Products(m, path, 0.1), Products(m, path, size=0.9)):
        assert float(loss(wrong).detach()) > 1e-6


@each_path
def test_the_ends_of_the_line(name: str) -> None:
    """gamma = 1 is x_t, gamma = 0 has the signal of x_t and the noise of x_u."""
    teacher, batch = scene(name)
    path = teacher.path
    m = method(name)
    at = m.pair(path, batch)
    xu = solve(teacher, at.xt, at.t, at.u, None, 1.0, 1)
    (alpha, sigma), (alpha_u, sigma_u) = (coefficients(path, xu, t) for t in (at.t, at.u))
    for noise in ("shared", "independent"):
        one = replace(m, noise=noise)
        high = one.between(path, at, xu, torch.ones_like(at.t))
        torch.testing.assert_close(high.x, at.xt)
        torch.testing.assert_close(high.sigma, sigma)
        low = one.between(path, at, xu, torch.zeros_like(at.t))
        torch.testing.assert_close(low.x, alpha / alpha_u * xu)
        torch.testing.assert_close(low.sigma, alpha / alpha_u * sigma_u)


@each_path
def test_the_shared_level_is_that_of_one_noise(name: str) -> None:
    """Of x_u with the data and noise of x_t, x_gamma is alpha_t x_0 + sigma_gamma eps."""
    _, batch = scene(name)
    path, m = STARTS[name][0], method(name)
    at = m.pair(path, batch)
    assert batch.x0 is not None
    assert batch.draws is not None
    eps = batch.draws.normal("eps", (1,)).double()
    xu = perturb(path, batch.x0, eps, at.u)
    point = m.between(path, at, xu, batch.draws.uniform("gamma").double())
    alpha = path.alpha(at.t)[:, None]
    torch.testing.assert_close(point.x, alpha * batch.x0 + point.sigma * eps)

    class Told(nn.Module):
        """The g that reads the right eps."""

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, gamma: Tensor) -> Tensor:
            out: Tensor = (xt - path.sigma(t)[:, None] * eps) / alpha
            return out

    told: Any = Told()
    told.path = path
    torch.testing.assert_close(m.end(told, at, point), perturb(path, batch.x0, eps, at.s))
    other = replace(m, noise="independent")
    level = other.between(path, at, xu, point.gamma)
    assert (
        float((other.end(told, at, level) - perturb(path, batch.x0, eps, at.s)).abs().max()) > 1e-3
    )


def test_golden_levels_of_stable_diffusion() -> None:
    """Halfway from 519 to 499: on the line, and as released."""
    t, u = torch.tensor([519.0], dtype=F64), torch.tensor([499.0], dtype=F64)
    x = torch.zeros(1, 1, dtype=F64)
    at, half = Pair(x, t, u, 0 * t, None), torch.tensor([0.5], dtype=F64)
    levels = {
        noise: float(SLAM(noise=noise).between(VP(), at, x, half).sigma)  # type: ignore[arg-type]
        for noise in ("shared", "independent")
    }
    assert levels == pytest.approx({"shared": 0.83704892, "independent": 0.82337518}, rel=1e-6)


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_at_gamma_one_it_is_consistency_distillation(name: str) -> None:
    """On a mixture, against the difference by hand of two jumps."""
    path = STARTS[name][0]
    teacher: Any = TEACHERS["mixture"](path)
    draws = Draws.range(0, 40)
    x0 = teacher.sample(40, torch.Generator().manual_seed(0)).double()
    m = method(name, c=0.5)

    class Hears(nn.Module):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, gamma: Tensor) -> Tensor:
            out: Tensor = teacher(xt, t) * (1 + 0.1 * gamma[:, None])
            return out

    student: Any = Hears()
    student.path = path
    at = m.pair(path, Batch(x0, None, x0, draws))
    xu = solve(teacher, at.xt, at.t, at.u, None, 1.0, 1)
    made = m.end(student, at, m.between(path, at, xu, torch.ones_like(at.t)))
    by_hand = path.ddim(at.xt, 1.1 * teacher(at.xt, at.t), at.t, at.s)
    torch.testing.assert_close(made, by_hand)
    found = m.student_loss(Nets({"student": student}), teacher, Batch(x0, None, x0, draws)).total
    gamma = draws.uniform("gamma").double()
    apart = m.end(student, at, m.between(path, at, xu, gamma)) - path.ddim(
        xu, 1.1 * teacher(xu, at.u), at.u, at.s
    )
    assert found is not None
    torch.testing.assert_close(found, ((apart**2 + 0.25).sqrt() - 0.5).mean())


def test_the_student_is_told_gamma_and_starts_as_the_teacher() -> None:
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    nets = SLAM().init(net, net)
    assert set(nets) == {"student", "target"}
    draws = Draws.range(0, 4)
    x, t, cond = draws.normal("x", (2,)), draws.uniform("t"), draws.integers("label", 3)
    student: Any = nets["student"]
    assert torch.equal(student(x, t, cond, gamma=t), net(x, t, cond))
    assert SLAM().result(model) == replace(model, inputs=("gamma",))


def test_guidance_is_the_teachers() -> None:
    net: Any = stirred(Model(MLP(16, 1), (2,), 3).build(2), 2).double()
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)

    class Guided(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            free = net(xt, t, None)
            return free + 2.5 * (net(xt, t, cond) - free)  # type: ignore[no-any-return]

    m = method("ve", kappa=2.5)
    nets = m.init(net, net)
    guided: Any = Guided()
    found = m.student_loss(nets, net, batch).total
    by_hand = replace(m, kappa=1.0).student_loss(nets, guided, batch).total
    assert found is not None
    assert by_hand is not None
    torch.testing.assert_close(found, by_hand)


def test_settings_that_mean_nothing_are_refused() -> None:
    for settings, message in (
        ({"noise": "none"}, "'shared' or 'independent'"),
        ({"c": 0.0}, "is positive"),
        ({"decay": 1.0}, "below 1; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SLAM(**settings)  # type: ignore[arg-type]
    _, batch = scene("flow")
    for path, start in ((Flow(), 1.0), (TrigFlow(), math.pi / 2)):
        m = SLAM(WithInput(FewStep(start), "gamma", 1.0))
        with pytest.raises(ValueError, match="start its sampler a little below"):
            m.pair(path, batch)
