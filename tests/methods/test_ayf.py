"""AYF: both tangents vanish at the exact flow map, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.losses.distance import squared_norm
from fewstep.methods.ayf import AYF
from fewstep.nets.mlp import MLP
from tests.gaussians import GaussianFlowMap
from tests.instances import PATHS
from tests.maps import SolvedMap, scene
from tests.networks import stirred
from tests.quadrature import F64

each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
each_objective = pytest.mark.parametrize("objective", ["emd", "lmd"])


def method(path: NoisePath, objective: Any = "emd", **settings: Any) -> AYF:
    start = path.t_max if path.t_max in (3.0, 999.0) else min(20.0, 0.95 * path.t_max)
    return AYF(Jumps(start), objective, **settings)


class Deaf(SolvedMap):
    """The denoiser, which does not know s."""

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        out: Tensor = self.teacher(xt, t) + self.shift
        return out


@each_path
@each_objective
def test_the_flow_map_of_a_gaussian_has_no_tangent(path: NoisePath, objective: Any) -> None:
    """To 1e-6 of what the denoiser's is, and no loss."""
    teacher, batch = scene(path)
    m, exact = method(path, objective), GaussianFlowMap(teacher)
    at = m.point(path, teacher, batch)
    scale = m.tangent(Deaf(teacher, 1), teacher, at, 1.0)[1].abs().mean()
    assert float(scale) > 0.02
    _, tangent = m.tangent(exact, teacher, at, 1.0)
    assert float(tangent.abs().max()) < 1e-6 * max(1.0, float(scale))
    found = m.student_loss(1.0, Nets({"student": exact}), teacher, batch)
    assert found.total is not None
    assert found.total.item() < 1e-10


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow()], ids=repr)
@each_objective
def test_the_flow_map_of_a_mixture_has_neither_tangent_nor_gradient(
    path: NoisePath, objective: Any
) -> None:
    """To the error of its integration, 1e-4; the denoiser has both."""
    teacher, batch = scene(path, "mixture", 12)
    m = method(path, objective)
    slopes = []
    for net in (SolvedMap(teacher, 12), Deaf(teacher, 1)):
        total = m.student_loss(1.0, Nets({"student": net}), teacher, batch).total
        assert total is not None
        (gradient,) = torch.autograd.grad(total, net.shift)
        slopes.append((total.item(), float(gradient.abs().max())))
    assert slopes[0][0] < 1e-6
    assert slopes[0][1] < 1e-3
    assert slopes[1][0] > 0.05
    assert slopes[1][1] > 1e-2


@pytest.mark.parametrize("r", [0.0, 0.7, 0.99])
def test_a_warm_up_that_is_not_over_is_another_map(r: float) -> None:
    """At the exact map (1 - r)(u - v) is left."""
    teacher, batch = scene(Flow())
    m = method(Flow())
    at = m.point(Flow(), teacher, batch)
    u, tangent = m.tangent(GaussianFlowMap(teacher), teacher, at, r)
    v = at.velocity(Flow(), at.f)
    torch.testing.assert_close(tangent, (1 - r) * (u - v), rtol=1e-6, atol=1e-8)
    assert float(tangent.abs().mean()) > 0.001


@each_objective
def test_the_published_tangents(objective: Any) -> None:
    """On a rectified flow, term by term, of another map: x - (t - s) F, derivatives by jvp."""
    path, r = Flow(), 0.6
    teacher, batch = scene(path)
    other = GaussianFlowMap(scene(path)[0])
    other.teacher = scene(path)[0]
    other.teacher.means = other.teacher.means + 0.3
    m = method(path, objective)
    at = m.point(path, teacher, batch)
    t, s, span = at.t[:, None], at.s[:, None], (at.t - at.s)[:, None]

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (x - other(x, t[:, 0], s=s[:, 0])) / t

    v, one = (at.xt - teacher(at.xt, at.t)) / t, torch.ones_like(t)
    if objective == "emd":
        value, rate = torch.func.jvp(f, (at.xt, t, s), (v, one, 0 * one))  # type: ignore[misc]
        published = value - v + r * span * rate
    else:
        value, rate = torch.func.jvp(lambda s: f(at.xt, t, s), (s,), (one,))  # type: ignore[misc]
        x = at.xt - span * value
        published = value - (x - teacher(x, at.s)) / s - span * rate
    u, tangent = m.tangent(other, teacher, at, r)
    torch.testing.assert_close(u, value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tangent, published, rtol=1e-5, atol=1e-7)


def test_tangents_are_normalised_over_a_sample() -> None:
    """|T| / (|T| + c) squared, a mean over dimensions; the target is on the right side of u."""
    teacher, batch = scene(VE())
    m, net = method(VE(), c=0.3), Deaf(teacher, 1)
    at = m.point(VE(), teacher, batch)
    size = squared_norm(m.tangent(net, teacher, at, 1.0)[1]).sqrt()
    found = m.student_loss(1.0, Nets({"student": net}), teacher, batch)
    torch.testing.assert_close(found.total, ((size / (size + 0.3)) ** 2).mean() / 2)
    torch.testing.assert_close(found.logs["tangent"], size.mean())
    total = found.total
    assert total is not None
    (gradient,) = torch.autograd.grad(total, net.shift)
    _, tangent = m.tangent(net, teacher, at, 1.0)
    tau = VE().flow_time(at.t)[:, None]
    torch.testing.assert_close(gradient, (-tangent / (size + 0.3) / tau).mean(0))


def test_times_and_warm_up() -> None:
    """Jumps lie within the sampler's range, and their lengths have the law; r is of the step."""
    m = AYF(Jumps(0.8), warmup=4, r=0.99)
    teacher, batch = scene(Flow(), count=4000)
    at = m.point(Flow(), teacher, batch)
    assert 0.001 <= float(at.s.min()) < 0.01
    assert 0.7 < float(at.t.max()) <= 0.8
    length = (at.t - at.s) / 0.8
    expected = m.lengths.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=F64))
    found = length.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=F64))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    rs = [turn.loss.args[0] for k in range(6) for turn in m.turns(k)]  # type: ignore[attr-defined]
    assert rs == pytest.approx([0.0, 0.2475, 0.495, 0.7425, 0.99, 0.99])


@each_objective
def test_differences_in_place_of_forward_mode(objective: Any) -> None:
    teacher, batch = scene(Flow())
    exact = GaussianFlowMap(teacher)
    at = method(Flow()).point(Flow(), teacher, batch)
    difference = method(Flow(), objective, derivative="difference")
    _, tangent = difference.tangent(exact, teacher, at, 1.0)
    assert 0 < float(tangent.abs().max()) < 1e-2


def test_guidance_is_the_teachers() -> None:
    path = Flow()
    net = Model(MLP(16, 1), (2,), 3, path, "velocity").build(2).double()
    stirred(net, 3)
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    m = AYF(Jumps(1.0), "lmd", kappa=2.5)
    at = m.point(path, net, batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    torch.testing.assert_close(at.f, free + 2.5 * (told - free))
    student: Any = m.init(net, net)["student"]
    u, tangent = m.tangent(student, net, at, 1.0)
    y = at.xt - (at.t - at.s)[:, None] * u
    free, told = net(y, at.s, None), net(y, at.s, batch.cond)
    v = (y - free - 2.5 * (told - free)) / at.s[:, None]
    torch.testing.assert_close(tangent, u - v)  # the student does not hear s yet


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "smd"}, "'emd' or 'lmd'"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"r": 1.5}, r"r in \[0, 1\]"),
        ({"c": 0.0}, "c > 0"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
        ({"sampler": FewStep(2.5)}, "Jumps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AYF(**settings)
