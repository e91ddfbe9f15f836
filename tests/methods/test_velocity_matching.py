"""Velocity matching: the exact consistency function is its fixed point, unless the rate alone is
divided; velocity distillation pushes samples, and not at that point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import FlowPoint
from fewstep.distillation.method import Nets
from fewstep.losses.distance import squared_norm
from fewstep.methods.velocity_matching import VelocityMatching
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from tests.instances import PATHS
from tests.maps import Consistency, KnownMap, SolvedMap, scene
from tests.networks import stirred
from tests.quadrature import F64

each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
LAW = Uniform(0.1, 1.0)


def method(path: NoisePath, **settings: Any) -> VelocityMatching:
    start = path.t_max if path.t_max in (3.0, 999.0) else min(20.0, 0.95 * path.t_max)
    return VelocityMatching(FewStep(start), LAW, **settings)


def slope(m: VelocityMatching, net: KnownMap, teacher: Any, batch: Batch) -> float:
    total = m.student_loss(Nets({"student": net}), teacher, batch).total
    assert total is not None
    (gradient,) = torch.autograd.grad(total, net.shift)
    return float(gradient.abs().max())


@each_path
@pytest.mark.parametrize("normalise", ["whole", "none"])
def test_the_consistency_function_of_a_gaussian_is_the_fixed_point(
    path: NoisePath, normalise: Any
) -> None:
    """On data and on samples: no pull, no gradient; another function has both."""
    teacher, batch = scene(path)
    m, exact = method(path, normalise=normalise), Consistency(teacher)
    assert batch.x0 is not None
    at = m.point(path, teacher, batch.x0, batch)
    assert float(m.pull(exact, at)[1].abs().max()) < 1e-6
    assert slope(m, exact, teacher, batch) < 1e-5
    other = Consistency(teacher, 0.35)
    assert float(m.pull(other, at)[1].abs().mean()) > 0.01
    assert slope(m, other, teacher, batch) > 1e-3


def test_the_consistency_function_of_a_mixture_is_the_fixed_point() -> None:
    """To the error of its integration; the denoiser is far from it."""
    path = Flow(1e-6)
    teacher, batch = scene(path, "mixture", 8)
    m = method(path, normalise="none")
    exact = SolvedMap(teacher, 16, lambda t: 0 * t + 1e-6)
    assert batch.x0 is not None
    at = m.point(path, teacher, batch.x0, batch)
    assert float(m.pull(exact, at)[1].abs().max()) < 1e-3
    assert slope(m, exact, teacher, batch) < 1e-3
    assert float(m.pull(teacher, at)[1].abs().mean()) > 0.05


def test_the_rate_divided_alone_is_another_fixed_point() -> None:
    """N(0.3, 1/4) at t = 0.9 of a flow: golden residual 0.41 at the exact mean velocity."""
    path = Flow(0.0)
    teacher = Gaussian(torch.tensor([0.3], dtype=F64), torch.tensor([[0.25]], dtype=F64), path)
    exact = Consistency(teacher)
    exact.shift = nn.Parameter(torch.zeros(1, dtype=F64))
    x = torch.linspace(-1.7, 2.1, 7, dtype=F64)[:, None]
    t = torch.full((7,), 0.9, dtype=F64)
    at = FlowPoint(x, t, 0 * t, None, teacher(x, t))
    residual = {
        how: float(VelocityMatching(normalise=how).pull(exact, at)[1].abs().max())  # type: ignore[arg-type]
        for how in ("rate", "whole", "none")
    }
    assert residual["rate"] == pytest.approx(0.41, abs=0.005)
    assert max(residual["whole"], residual["none"]) < 1e-9


def test_both_terms_by_hand() -> None:
    """|pull|^2 on data, and <pull, x> at samples with noise of their own."""
    path = Flow()
    teacher, batch = scene(path)
    m, net = method(path, match=2.0, distil=3.0, c=0.2), Consistency(teacher, 0.4)
    assert batch.x0 is not None
    at = m.point(path, teacher, batch.x0, batch)
    raw = replace(m, normalise="none").pull(net, at)[1]
    size = squared_norm(raw).sqrt()
    u, pull = m.pull(net, at)
    torch.testing.assert_close(pull, raw / (size + 0.2))
    tau = path.flow_time(at.t)[:, None]
    torch.testing.assert_close(u, (at.xt - net(at.xt, at.t)) / tau)
    z = 0.95 * batch.z
    x = net(z, torch.full((len(z),), 0.95, dtype=F64))
    assert batch.draws is not None
    own = batch._replace(draws=batch.draws.under("distil"))
    push = m.pull(net, m.point(path, teacher, x.detach(), own))[1]
    found = m.student_loss(Nets({"student": net}), teacher, batch)
    expected = 2 * (pull**2).mean() + 3 * (push * x).mean()
    torch.testing.assert_close(found.total, expected)
    assert found.total is not None
    (gradient,) = torch.autograd.grad(found.total, net.shift)
    by_hand = (2 * 2 * (-pull) * -1 / tau / 2 + 3 * push / 2).mean(0)
    torch.testing.assert_close(gradient, by_hand)
    alone = replace(m, distil=0.0).student_loss(Nets({"student": net}), teacher, batch).total
    torch.testing.assert_close(alone, 2 * (pull**2).mean())


@pytest.mark.parametrize("power", [0.3, 0.7])
def test_distillation_mends_the_spread_of_samples(power: float) -> None:
    """Samples too wide are pushed in, and samples too narrow out."""
    teacher, batch = scene(Flow(), count=4000)
    m, net = method(Flow(), match=0.0), Consistency(teacher, power)
    draws = Draws.range(0, 4000)
    z = 0.95 * draws.normal("z", (2,), F64)
    x = net(z, torch.full((4000,), 0.95, dtype=F64)).detach()
    push = m.pull(net, m.point(Flow(), teacher, x, batch))[1]
    wider = float((push * (x - x.mean(0))).mean())  # descent moves x against it
    assert wider * (0.5 - power) > 1e-4


def test_guidance_and_differences() -> None:
    path = Flow()
    net = Model(MLP(16, 1), (2,), 3, path, "velocity").build(2).double()
    stirred(net, 3)
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    m = VelocityMatching(FewStep(1.0), LAW, kappa=2.5)
    at = m.point(path, net, x0, batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    torch.testing.assert_close(at.f, free + 2.5 * (told - free))
    near = replace(m, derivative="difference").pull(net, at)[1]
    torch.testing.assert_close(near, m.pull(net, at)[1], atol=1e-3, rtol=1e-3)
    assert not torch.equal(near, m.pull(net, at)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": -1.0}, "0 or more"),
        ({"match": 0.0, "distil": 0.0}, "not both 0"),
        ({"c": 0.0}, "c > 0"),
        ({"normalise": "all"}, "'whole', 'rate' or 'none'"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VelocityMatching(**settings)
