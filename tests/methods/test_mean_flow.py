"""MeanFlow: the exact flow map is its fixed point, on every path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath, expand, perturb, x0_to_velocity
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Jumps
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import FlowPoint
from fewstep.distillation.method import Nets
from fewstep.methods.mean_flow import MeanFlow
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from tests.gaussians import GaussianFlowMap
from tests.instances import PATHS, TEACHERS
from tests.networks import stirred
from tests.quadrature import F64

each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
LAW = Uniform(0.05, 0.9)


def scene(path: NoisePath, count: int = 200) -> tuple[Any, GaussianFlowMap, Batch]:
    """An exact teacher, its flow map, and data of its own law."""
    teacher: Any = TEACHERS["gaussian"](path)
    draws = Draws.range(0, count)
    mean, variance, basis = (x[0] for x in (teacher.means, teacher.variances, teacher.basis))
    x0 = mean + (draws.normal("data", (2,), F64) * variance.sqrt()) @ basis.T
    return teacher, GaussianFlowMap(teacher), Batch(x0, None, x0, draws)


def mean_velocity(net: Any, at: FlowPoint) -> Tensor:
    path: NoisePath = net.path
    y = at.xt / expand(path.alpha(at.t) + path.sigma(at.t), at.xt)
    out: Tensor = (y - net(at.xt, at.t, None, s=at.s)) / expand(path.flow_time(at.t), at.xt)
    return out


@each_path
def test_the_exact_flow_map_is_the_fixed_point(path: NoisePath) -> None:
    teacher, exact, batch = scene(path)
    m = MeanFlow(times=LAW, diagonal=0.2)
    at = m.point(path, teacher, batch)
    assert bool((at.s <= at.t).all())
    assert 0.1 < float((at.s == at.t).double().mean()) < 0.4
    u = mean_velocity(exact, at)
    torch.testing.assert_close(m.target(exact, at), u, rtol=1e-6, atol=1e-7)
    found = m.student_loss(Nets({"student": exact}), teacher, batch)
    assert float(found.logs["error"]) < 1e-12


@each_path
def test_gauges_look_at_times_of_the_path(path: NoisePath) -> None:
    """`times` are flow times; the noise levels have those, as far as the path goes."""
    law = MeanFlow().noise_levels(path)
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=F64)
    low, high = path.flow_time(torch.tensor([path.t_min, path.t_max], dtype=F64)).tolist()
    taus = MeanFlow().times.quantile(quantiles).clamp(low, high)
    torch.testing.assert_close(path.flow_time(law.quantile(quantiles)), taus, rtol=1e-5, atol=1e-6)


@each_path
def test_another_map_is_not(path: NoisePath) -> None:
    """The denoiser itself, which does not know s: right on the diagonal alone."""
    teacher, exact, batch = scene(path)
    m = MeanFlow(times=LAW, diagonal=0.0)
    at = m.point(path, teacher, batch)

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = path

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            out: Tensor = teacher(xt, t)
            return out

    u = mean_velocity(Deaf(), at)
    assert (m.target(Deaf(), at) - u).abs().mean() > 0.02 * u.abs().mean()
    straight = at._replace(s=at.t)
    u = mean_velocity(Deaf(), straight)
    torch.testing.assert_close(m.target(Deaf(), straight), u, rtol=1e-6, atol=1e-8)
    assert (mean_velocity(exact, at) - mean_velocity(Deaf(), at)).abs().mean() > 0.02


@each_path
def test_a_jump_of_the_fixed_point_is_the_flow(path: NoisePath) -> None:
    """y - (tau - rho) u in flow time is `path.ddim` with g: what `Jumps` does."""
    teacher, exact, batch = scene(path)
    at = MeanFlow(times=LAW, diagonal=0.0).point(path, teacher, batch)
    tau, rho = (expand(path.flow_time(time), at.xt) for time in (at.t, at.s))
    scale, end = (expand(path.alpha(time) + path.sigma(time), at.xt) for time in (at.t, at.s))
    jumped = end * (at.xt / scale - (tau - rho) * mean_velocity(exact, at))
    stepped = path.ddim(at.xt, exact(at.xt, at.t, None, s=at.s), at.t, at.s)
    torch.testing.assert_close(jumped, stepped, rtol=1e-9, atol=1e-9)


def test_the_velocity_of_data_has_the_same_fixed_point_on_average() -> None:
    """Given x_t it scatters around the teacher's: its mean gradient is zero, its loss is not."""
    path = Flow()
    teacher, exact, batch = scene(path, 200_000)
    m = MeanFlow(times=LAW, diagonal=0.0, velocity="data")
    at = m.point(path, teacher, batch)
    apart = mean_velocity(exact, at) - m.target(exact, at)
    seen = torch.stack([torch.ones_like(at.t), at.t, at.xt[:, 0], at.xt[:, 1], at.s])
    moments = (seen[:, :, None] * apart).mean(1)
    assert float(moments.abs().max()) < 0.01
    assert float((apart**2).mean()) > 0.1
    wrong = (seen[:, :, None] * (apart + (at.t - at.s)[:, None] * 0.3)).mean(1)
    assert float(wrong.abs().max()) > 0.05  # the check can fail


@each_path
def test_differences_in_place_of_forward_mode(path: NoisePath) -> None:
    teacher, exact, batch = scene(path)
    at = MeanFlow(times=LAW, diagonal=0.0).point(path, teacher, batch)
    forward, difference = (
        MeanFlow(times=LAW, derivative=how).target(exact, at)  # type: ignore[arg-type]
        for how in ("forward", "difference")
    )
    torch.testing.assert_close(difference, forward, rtol=2e-3, atol=2e-3)
    assert not torch.equal(difference, forward)


def test_the_student_starts_as_the_teacher() -> None:
    """And its description says what was added, once."""
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build(1)
    m = MeanFlow()
    student: Any = m.init(net, net)["student"]
    draws = Draws.range(0, 4)
    x, t = draws.normal("x", (2,)), draws.uniform("t")
    cond = draws.integers("label", 3)
    assert torch.equal(student(x, t, cond, s=t / 2), net(x, t, cond))
    assert m.result(model) == replace(model, inputs=("s",))
    assert m.result(m.result(model)) == m.result(model)
    again: Any = m.init(net, student)["student"]
    assert isinstance(again, ExtraInputs)
    assert again.input_names == ("s",)
    built = m.result(model).build()
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }


def test_large_errors_count_less() -> None:
    """The loss of a sample over (|error|^2 + c)^p: bounded at p = 1, the plain mean at p = 0."""
    teacher, exact, batch = scene(VE())

    class Off(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            return exact(xt, t, cond, s=s) + 100

    nets = Nets({"student": Off()})
    plain = MeanFlow(times=LAW, p=0.0).student_loss(nets, teacher, batch)
    assert plain.total is not None
    assert float(plain.total) == pytest.approx(float(plain.logs["error"]))
    bounded = MeanFlow(times=LAW, p=1.0).student_loss(nets, teacher, batch).total
    assert bounded is not None
    assert float(bounded) == pytest.approx(0.5, rel=1e-3)  # a mean of two over their sum


def test_the_size_that_divides_a_loss_has_no_gradient() -> None:
    """The loss of a shift b is b^2 over a constant: b times its derivative is twice the loss."""
    teacher, exact, batch = scene(VE())
    shift = torch.tensor(100.0, dtype=F64, requires_grad=True)

    class Shifted(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            return exact(xt, t, cond, s=s) + shift

    m = MeanFlow(times=LAW, diagonal=1.0, p=1.0)
    total = m.student_loss(Nets({"student": Shifted()}), teacher, batch).total
    assert total is not None
    (slope,) = torch.autograd.grad(total, shift)
    assert float(slope * shift) == pytest.approx(2 * float(total), rel=0.05)


@each_path
def test_times_are_drawn_as_shares_of_noise(path: NoisePath) -> None:
    """The same flow times on every path; their inverse is exact, and ends at the path's ends."""
    tau = torch.linspace(0.02, 0.97, 20, dtype=F64)
    inside = (tau > path.flow_time(torch.tensor(path.t_min, dtype=F64))) & (
        tau < path.flow_time(torch.tensor(path.t_max, dtype=F64))
    )
    back = path.flow_time(path.time_of(tau))
    torch.testing.assert_close(back[inside], tau[inside], rtol=1e-9, atol=1e-9)
    assert inside.sum() > 10 or path.t_max < 10
    ends = path.time_of(torch.tensor([0.0, 1.0], dtype=F64))
    assert ends.tolist() == pytest.approx([path.t_min, path.t_max], abs=1e-9)


def test_guidance_is_that_of_the_teachers_velocity() -> None:
    """f_kappa in place of f, in the target and in the direction of the derivative."""
    path = Flow()
    net = Model(MLP(16, 1), (2,), 3, path, "velocity").build(2).double()
    stirred(net, 3)
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    at = MeanFlow(Jumps(1.0), kappa=2.5).point(path, net, batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    torch.testing.assert_close(at.f, free + 2.5 * (told - free))
    eps = draws.normal("eps", (2,)).double()
    torch.testing.assert_close(at.xt, perturb(path, x0, eps, at.t))
    along = x0_to_velocity(path, at.xt, at.f, at.t)
    torch.testing.assert_close(along, (at.xt - at.f) / at.t[:, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diagonal": 1.5}, "diagonal in"),
        ({"c": 0.0}, "c > 0"),
        ({"p": -1.0}, "p >= 0"),
        ({"velocity": "student"}, "'teacher' or 'data'"),
        ({"derivative": "reverse"}, "'forward' or 'difference'"),
        ({"velocity": "data", "kappa": 2.0}, "guides the teacher's velocity"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanFlow(**settings)


def test_a_network_without_a_place_for_a_time_is_refused() -> None:
    ring = GaussianMixture.ring()
    with pytest.raises(ValueError, match="time_embedding"):
        MeanFlow().init(ring, _Plain())


class _Plain(nn.Module):
    """A network of one's own that does not say where it embeds its time."""

    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt * self.w
