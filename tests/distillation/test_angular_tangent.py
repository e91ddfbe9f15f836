"""TrigFlow's angle, the tangent on it, and the sizes of its loss by level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow
from fewstep.distillation.angular_tangent import (
    Levels,
    Point,
    angle,
    follow,
    tangent,
    tangent_loss,
)
from fewstep.distillation.method import Nets, Step
from tests.quadrature import F64

LAM = 0.09


class Ends(nn.Module):
    """The prediction (lam / L_t)^power x_t: at power 1/2 the end of the flow of N(0, lam)."""

    def __init__(self, path: NoisePath, power: float = 0.5) -> None:
        super().__init__()
        self.path, self.power = path, power
        self.size = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        spread = self.path.alpha(t) ** 2 * LAM + self.path.sigma(t) ** 2
        return self.size * (LAM / spread)[:, None] ** self.power * xt


def scene(path: NoisePath) -> Point:
    """Seven points, and the exact prediction of N(0, lam) there."""
    t = torch.linspace(0.05, 0.95, 7, dtype=F64)
    xt = torch.linspace(-1.7, 2.1, 7, dtype=F64)[:, None]
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return Point(xt, t, None, alpha * LAM / (alpha**2 * LAM + sigma**2) * xt)


def test_the_angle_in_closed_form() -> None:
    """tan theta = t / s_d on VE, where dtheta/dt = s_d / (s_d^2 + t^2); t itself on TrigFlow."""
    at = scene(VE())
    cosine, sine, speed = angle(VE(), at, 0.5)
    t = at.t[:, None]
    torch.testing.assert_close(sine / cosine, t / 0.5)
    torch.testing.assert_close(speed, 0.5 / (0.25 + t**2))
    cosine, sine, speed = angle(TrigFlow(), at, 1.0)
    torch.testing.assert_close(sine, t.sin())
    torch.testing.assert_close(speed, torch.ones_like(t))


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow()], ids=repr)
def test_the_end_of_the_flow_has_no_tangent(path: NoisePath) -> None:
    """Controls: while r < 1 it has, and at every r another function, such as the denoiser."""
    at = scene(path)
    assert float(tangent(Ends(path), at, 0.5, 1.0, "forward").abs().max()) < 1e-12
    assert float(tangent(Ends(path), at, 0.5, 0.5, "forward").abs().max()) > 0.02
    assert float(tangent(Ends(path, 1.0), at, 0.5, 1.0, "forward").abs().max()) > 0.02


def test_the_loss_and_its_sums_by_hand() -> None:
    """|g / (|g| + c)|^2 over sigma / alpha, divided by the mean of its level, if there are any."""
    path = Flow()
    at, student = scene(path), Ends(path, 1.0)
    g = tangent(student, at, 0.5, 1.0, "forward")
    level = (at.t / (1 - at.t))[:, None]
    each = ((g / (g.abs() + 0.1)) ** 2 / level)[:, 0]
    index = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    plain = tangent_loss(Nets({"student": student}), at, g, index, 0.5, 0.1)
    assert plain.total is not None
    assert not plain.sums
    torch.testing.assert_close(plain.total.detach(), each.mean())
    torch.testing.assert_close(plain.logs["tangent"], g.abs().mean())
    levels = Levels(2)
    levels.mean.copy_(torch.tensor([2.0, 0.5]))
    found = tangent_loss(Nets({"student": student, "level": levels}), at, g, index, 0.5, 0.1)
    assert found.total is not None
    weights = torch.tensor([0.5] * 3 + [2.0] * 4, dtype=F64)
    torch.testing.assert_close(found.total.detach(), (weights * each).mean())
    assert found.sums["count"].tolist() == [3, 4]
    torch.testing.assert_close(found.sums["total"], torch.stack([each[:3].sum(), each[3:].sum()]))


def test_means_by_level() -> None:
    """The first counts in full, and a level without samples keeps its own."""
    levels = Levels(3)
    index = torch.tensor([0, 1, 2])
    assert levels.weight(index).tolist() == [1, 1, 1]
    levels.follow(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([8.0, 0.5, 0.0]), 0.9)
    assert levels.mean.tolist() == [4, 0.5, 0]
    assert levels.weight(index).tolist() == [0.25, 2, 1]
    levels.follow(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([14.0, 0.0, 4.0]), 0.9)
    assert levels.mean.tolist() == pytest.approx([5, 0.5, 1])


def test_means_follow_a_step_that_says_something() -> None:
    """A twentieth of a step's mean is taken in; a net without levels is told nothing."""
    nets = Nets({"level": Levels(1)})
    sums = {"count": torch.tensor([4.0]), "total": torch.tensor([8.0])}
    follow(Step(nets, nn.Identity(), 0, 0, 4, sums))
    assert nets["level"].mean.tolist() == [2]
    follow(Step(nets, nn.Identity(), 1, 4, 4, {**sums, "total": torch.tensor([88.0])}))
    assert nets["level"].mean.tolist() == pytest.approx([0.95 * 2 + 0.05 * 22])
    follow(Step(Nets(), nn.Identity(), 2, 8, 4, {}))
