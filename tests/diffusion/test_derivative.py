"""Derivatives of every architecture against finite differences in float64, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.derivative import difference_step, jvp
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, x0_to_velocity
from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.precision import store_in_bf16
from tests.instances import PATHS, TEACHERS
from tests.networks import FLOW, NETS, samples, shape_of, stirred

F64 = torch.float64


def off(found: Tensor, expected: Tensor) -> float:
    """The relative distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def reference(f: Callable[[Tensor], Tensor], h: float | Tensor) -> Tensor:
    """df/dr at 0, of fourth order: Richardson's of two central differences."""
    one, two = ((f(k) - f(-k)) / (2 * k) for k in (torch.as_tensor(h), torch.as_tensor(h) / 2))
    return (4 * two - one) / 3


def flow_map(name: str, training: bool) -> Any:
    net = stirred(ExtraInputs(stirred(NETS[name]()), ("s",)))
    return net.train(training)


def eulerian(net: Any, name: str) -> tuple[list[Tensor], list[Tensor | float], Tensor]:
    """Primals (x_t, t, s), the direction (v, 1, 0), and the true derivative."""
    xt, t, _, s = samples(net, shape_of(name), 2)
    one = difference_step(net.path, t[0], 1.0)
    v = torch.randn(xt.shape, generator=torch.Generator().manual_seed(5)) / one
    exact: Any = deepcopy(net).double().eval().requires_grad_(False)
    x64, t64, s64, v64 = (a.double() for a in (xt, t, s, v))
    expected = reference(lambda r: exact(x64 + r * v64, t64 + r, s=s64), 1e-5 * one.double())
    return [xt, t, s], [v, 1.0, 0.0], expected


FORWARD, DIFFERENCE, ONE_SIDED = 1e-4, 6e-3, 2e-2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_every_architecture(name: str, training: bool) -> None:
    """Both modes, whatever the network is doing; without d/dt it is another derivative."""
    net = flow_map(name, training)
    primals, direction, expected = eulerian(net, name)
    modes = {id(m): m.training for m in net.modules()}
    before = {key: t.clone() for key, t in net.state_dict().items()}

    def f(xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = net(xt, t, s=s)
        return out

    value, slope = jvp(f, primals, direction, net=net)
    assert off(slope, expected) < FORWARD
    assert not value.requires_grad
    assert not slope.requires_grad
    assert {id(m): m.training for m in net.modules()} == modes
    assert all(torch.equal(before[key], t) for key, t in net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(value, deepcopy(net).eval()(*primals[:2], s=primals[2]))
    h = difference_step(net.path, primals[1])
    again, near = jvp(f, primals, direction, net=net, how="difference", h=h)
    assert off(near, expected) < DIFFERENCE
    torch.testing.assert_close(again, value)
    ahead = jvp(f, primals, direction, net=net, how="difference", h=h, room=(0.0, 2 * h))[1]
    assert off(ahead, expected) < ONE_SIDED
    _, planted = jvp(f, primals, [direction[0], 0.0, 0.0], net=net)
    assert off(planted, expected) > 0.3


def test_recomputation_is_suspended() -> None:
    net = flow_map("adm", True)
    primals, direction, expected = eulerian(net, "adm")
    recompute(net)
    assert (
        off(jvp(lambda x, t, s: net(x, t, s=s), primals, direction, net=net)[1], expected)
        < FORWARD
    )


def test_only_s_moves() -> None:
    """The Lagrangian direction, with the other arguments f's own."""
    for name in ("mlp", "ddpm++", "edm2"):
        net = flow_map(name, True)
        xt, t, cond, s = samples(net, shape_of(name))
        exact: Any = deepcopy(net).double().eval().requires_grad_(False)
        args = xt.double(), t.double(), cond
        expected = reference(lambda r, e=exact, a=args, s=s: e(*a, s=s.double() + r), 1e-3)
        _, slope = jvp(lambda s, n=net, a=(xt, t, cond): n(*a, s=s), [s], [1.0], net=net)
        assert off(slope, expected) < FORWARD


def test_a_network_is_its_own_net() -> None:
    """Dropout is off in it without being asked; one that is not named has it on."""
    net: Any = stirred(NETS["adm"]()).train()
    xt, t, *_ = samples(net)
    (a, da), (b, db) = (jvp(net, [xt, t], [0.0, 1.0]) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(da, db)
    (a, _), (b, _) = (jvp(lambda x, t: net(x, t), [xt, t], [0.0, 1.0]) for _ in range(2))
    assert not torch.equal(a, b)


def test_a_network_that_rewrites_itself_must_be_named() -> None:
    """EDM2 in training, and batch normalisation."""
    edm2: Any = stirred(NETS["edm2"]()).train()
    xt, t, *_ = samples(edm2)
    normal = nn.BatchNorm2d(1).train()
    for net, primals in ((edm2, [xt, t]), (normal, [xt])):
        tangents = [1.0] * len(primals)
        with pytest.raises(ValueError, match="pass it to jvp as net, which puts it into eval"):
            jvp(lambda *args, net=net: net(*args), primals, tangents)
        assert jvp(lambda *args, net=net: net(*args), primals, tangents, net=net)[1].any()


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_nested_in_paths(path: NoisePath) -> None:
    """The velocity of a flow map, which takes derivatives of the path itself, in every direction
    and on every path."""
    model = Model(MLP(16, 2), (2,), 0, path, "v")
    net: Any = stirred(ExtraInputs(stirred(model.build()), ("s",))).double()
    top = min(path.t_max, 3.0 if path.t_max < 100 else 900.0)
    xt = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = top * torch.tensor([0.31366, 0.51166, 0.71733, 0.90966], dtype=F64)
    s, v = t / 2, torch.randn(4, 2, dtype=F64)

    def f(xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x0_to_velocity(path, xt, net(xt, t, s=s), t)

    h = difference_step(path, t, 1e-5).min()
    for direction in ((v, 1.0, 0.0), (0.0, 0.0, 1.0), (v, 1.0, 0.5)):
        value, slope = jvp(f, (xt, t, s), direction, net=net)
        with torch.no_grad():
            a, b, c = (torch.as_tensor(d, dtype=F64) for d in direction)
            expected = reference(lambda r, a=a, b=b, c=c: f(xt + r * a, t + r * b, s + r * c), h)
            torch.testing.assert_close(value, f(xt, t, s))
        assert off(slope, expected) < 1e-6


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_one_time_for_all_and_expanded_ones(path: NoisePath) -> None:
    net = stirred(ExtraInputs(stirred(Model(MLP(16, 2), (2,), 0, path, "v").build()), ("s",)))
    xt = torch.randn(4, 2)
    t, s = torch.tensor(0.7), torch.tensor(0.2)

    def f(xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = net(xt, t, s=s)
        return out

    for direction in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0)):
        _, expected = jvp(f, [xt, t.repeat(4), s.repeat(4)], direction)
        for times in ((t, s), (t.expand(4), s), (t, s.expand(4))):
            torch.testing.assert_close(jvp(f, [xt, *times], direction)[1], expected)
        h = difference_step(path, t).repeat(4)
        assert off(jvp(f, [xt, t, s], direction, how="difference", h=h)[1], expected) < 1e-2


def test_differences_stay_in_their_room() -> None:
    """Exact on a parabola wherever they are taken, and f is asked for nothing outside."""
    asked: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        asked.append(x)
        return 3 * x**2 - x

    x = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=F64)
    for h in (0.1, 0.5, 4.0, torch.full((5,), 0.2)):
        _, slope = jvp(f, [x], [2.0], how="difference", h=h, room=(-x / 2, (1 - x) / 2))
        torch.testing.assert_close(slope, 2 * (6 * x - 1))
    assert float(torch.stack(asked).min()) >= -1e-12
    assert float(torch.stack(asked).max()) <= 1 + 1e-12


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
def test_the_step_is_a_share_of_the_path(path: NoisePath) -> None:
    t = torch.tensor([0.3, 0.7], dtype=F64) * path.t_max
    h = difference_step(path, t, 1e-4)
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    low, high = path.label(ends)
    told = path.label(t + h) - path.label(t)
    torch.testing.assert_close(told / (high - low), torch.full_like(t, 1e-4), rtol=1e-3, atol=0)


def test_autocast_is_off_within_and_loses_no_gradient_after() -> None:
    """The casts of weights that a pass without gradients made are not used by the next one."""
    net = flow_map("mlp", True)
    primals, direction, expected = eulerian(net, "mlp")
    xt, t, s = primals
    with torch.autocast("cpu", torch.bfloat16):
        for how in ("forward", "difference"):
            h = difference_step(net.path, t)
            _, slope = jvp(
                lambda x, t, s: net(x, t, s=s), primals, direction, net=net, how=how, h=h
            )  # type: ignore[arg-type]
            assert off(slope, expected) < 1e-3
        net(xt, t, s=s).square().mean().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "label" not in n)


def test_weights_held_in_bf16() -> None:
    """As a frozen teacher has them: the derivative of the network of rounded weights."""
    net = flow_map("mlp", False)
    rounded = deepcopy(net)
    store_in_bf16(net)
    for p in rounded.parameters():
        p.data = p.data.bfloat16().float() if p.ndim > 1 else p.data
    args = eulerian(rounded, "mlp")
    rounded.net.net.label.weight.data = net.net.net.label.weight.data
    _, slope = jvp(lambda x, t, s: net(x, t, s=s), *args[:2], net=net)
    _, expected = jvp(lambda x, t, s: rounded(x, t, s=s), *args[:2], net=rounded)
    assert off(slope, expected) < 1e-6


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_exact_teachers_too(name: str) -> None:
    teacher: GaussianMixture = TEACHERS[name](Flow())
    x, t = torch.randn(5, 2, dtype=F64), torch.linspace(0.1, 0.9, 5, dtype=F64)
    v = torch.randn(5, 2, dtype=F64)
    _, slope = jvp(teacher, [x, t], [v, 1.0])
    assert off(slope, reference(lambda r: teacher(x + r * v, t + r), 1e-3)) < 1e-7


X = torch.randn(3, 1, 8, 8)
T = torch.full((3,), 0.5)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "how": ({"how": "backward"}, "jvp's how is 'forward' or 'difference', got 'backward'"),
    "count": ({"tangents": [1.0]}, "jvp got 2 primals and 1 tangents"),
    "shape": ({"tangents": [T, 1.0]}, r"tangent 0 has shape \(3,\), but its primal \(3, 1, 8, 8"),
    "no step": ({"how": "difference"}, "differences need a step h, such as difference_step"),
    "zero": ({"how": "difference", "h": 0.0}, "there is no room for differences; h is positive"),
    "no room": ({"how": "difference", "h": 1e-3, "room": (0.0, 0.0)}, "there is no room"),
    "half": (
        {"how": "difference", "h": 1e-3, "primals": [X.bfloat16(), T.bfloat16()]},
        "finite differences need float32, got torch.bfloat16; use how='forward'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case: str) -> None:
    given, words = REFUSED[case]
    net = FLOW.build()
    if case == "half":
        net = net.bfloat16()
    with pytest.raises(ValueError, match=words):
        jvp(net, **{"primals": [X, T], "tangents": [0.0, 1.0], **given})


def test_without_values() -> None:
    """On the device "meta", where `plan` counts a step's memory."""
    with torch.device("meta"):
        net: nn.Module = ExtraInputs(NETS["tokens"](), ("s",))
        x, t = torch.randn(2, 1, 20, 20), torch.ones(2)
        for how in ("forward", "difference"):
            value, slope = jvp(net, [x, t], [1.0, 1.0], how=how, h=1e-3)  # type: ignore[arg-type]
            assert value.is_meta
            assert slope.shape == x.shape
