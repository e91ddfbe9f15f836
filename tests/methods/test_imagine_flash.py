"""Imagine Flash: from the student's own states to where the teacher's flow ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets
from fewstep.methods import imagine_flash
from fewstep.methods.imagine_flash import ImagineFlash
from fewstep.nets.mlp import MLP
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.methods.test_battery import stirred
from tests.quadrature import F64
from tests.solved_flow import SolvedFlowMap

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


class Ends(nn.Module):
    """The exact consistency function (`low` is where the flow ends), times `size`."""

    def __init__(self, exact: Any, size: float = 1.0) -> None:
        super().__init__()
        self.exact, self.path = exact, exact.path
        self.size = nn.Parameter(torch.tensor(size, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        low = torch.full_like(t, self.path.t_min)
        out: Tensor = self.size * self.exact.teacher(self.exact.jump(xt, t, low), low)
        return out


def method(name: str, **settings: Any) -> ImagineFlash:
    return ImagineFlash(FewStep(STARTS[name][1], 3, "ddim"), **settings)


class Half(nn.Module):
    """The exact consistency function of N(0, 1/4)."""

    path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 0.5 * xt / (0.25 + t[:, None] ** 2).sqrt()


def test_exact_calls_make_the_law_with_fresh_noise_alone() -> None:
    """A spread of 1/2 by the default sampler, in closed form 0.7339 along chords."""
    draws = Draws.range(0, 100_000)
    z = draws.normal("z", (1,), F64)
    assert ImagineFlash().sampler == FewStep(10.0, 3, "fresh", 3.0)
    fresh, chords = (
        FewStep(10.0, 4, noise, 3.0)(Half(), z, None, draws).std().item()
        for noise in ("fresh", "ddim")
    )
    assert fresh == pytest.approx(0.5, abs=0.005)
    assert chords == pytest.approx(0.73393, abs=0.007)


def scene(name: str, kind: str, count: int = 40) -> tuple[Any, Any, Batch]:
    teacher: Any = TEACHERS[kind](STARTS[name][0])
    draws = Draws.range(0, count)
    exact = GaussianFlowMap(teacher) if kind == "gaussian" else SolvedFlowMap(teacher, 15)
    return teacher, exact, Batch(draws.normal("z", (2,), F64), None, None, draws)


def exactly(monkeypatch: pytest.MonkeyPatch, exact: Any) -> None:
    """The flow itself in place of the solver."""

    def jump(_teacher: Any, xt: Tensor, t: Tensor, s: Tensor, *_: Any) -> Tensor:
        out: Tensor = exact.jump(xt, t, s)
        return out

    monkeypatch.setattr(imagine_flash, "flow_end", jump)


def loss(m: ImagineFlash, k: int, student: nn.Module, teacher: Any, batch: Batch) -> Tensor:
    total = m.student_loss(Rollout(m.sampler, k), Nets({"student": student}), teacher, batch).total
    assert total is not None
    return total


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("gaussian", name) for name in STARTS), ("mixture", "ve"), ("mixture", "flow")],
)
def test_the_consistency_function_is_the_fixed_point(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the states of every call: no loss and no gradient; both of another function."""
    teacher, exact, batch = scene(name, kind)
    exactly(monkeypatch, exact)
    m = method(name)
    student = Ends(exact)
    for k in (1, 2, 3):
        total = loss(m, k, student, teacher, batch)
        assert float(total.detach()) < 1e-20
        (slope,) = torch.autograd.grad(total, student.size)
        assert abs(float(slope)) < 1e-9
        wrong = loss(m, k, Ends(exact, 0.9), teacher, batch)
        assert float(wrong.detach()) > 1e-4
    assert float(loss(m, 1, teacher, teacher, batch)) > 1e-3  # the start


def test_the_solver_comes_to_the_flow_from_the_students_state() -> None:
    """To second order, and from a state that is its own: a shifted student, a shifted state."""
    teacher, exact, batch = scene("flow", "gaussian")
    student, errors = Ends(exact, 0.8), []
    state = Rollout(method("flow").sampler, 2).state(Nets({"student": student}), batch)
    right = Ends(exact)(state.xt, state.t)
    for steps in (16, 32):
        target = method("flow", steps=steps).target(teacher, state, batch)
        errors.append(float((target - right).detach().abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.5)
    assert errors[1] < 1e-2
    first = Rollout(method("flow").sampler, 1).state(Nets({"student": student}), batch)
    apart = state.xt - Flow().ddim(first.xt, Ends(exact)(first.xt, first.t), first.t, first.s)
    assert float(apart.detach().abs().mean()) > 0.01


def test_one_call_has_a_gradient_and_the_target_none() -> None:
    """d/dsize of |x - sg|^2 with both the state and the target held."""
    teacher, exact, batch = scene("ve", "gaussian")
    for settings in ({}, {"shift": 1.0}):
        m, student = method("ve", **settings), Ends(exact, 0.8)
        state = Rollout(m.sampler, 2).state(Nets({"student": student}), batch)
        apart = (state.x0 - m.target(teacher, state, batch)).detach()
        by_hand = (2 * apart * state.x0.detach() / 0.8).mean()
        (slope,) = torch.autograd.grad(loss(m, 2, student, teacher, batch), student.size)
        assert float(slope) == pytest.approx(float(by_hand), rel=1e-9)
        assert not state.xt.requires_grad


@each_path
def test_the_shifted_reconstruction_pulls_to_the_mean(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean target in closed form, by noise of both signs; not zero at the exact function."""
    teacher, exact, _ = scene(name, "gaussian")
    exactly(monkeypatch, exact)
    draws = Draws.range(0, 40)
    z, half = draws.normal("z", (2,), F64), draws.normal("eps", (2,), F64)
    path, m = teacher.path, method(name, shift=1.0)

    class Given(Draws):
        def normal(self, purpose: str, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.cat([half, -half]).to(dtype)

    batch = Batch(z.repeat(2, 1), None, None, Given(torch.arange(80)))
    student = Ends(exact)
    state = Rollout(m.sampler, 2).state(Nets({"student": student}), batch)
    target = m.target(teacher, state, batch)
    x = state.x0.detach()[:40]
    ladder: Any = m.sampler
    tau, start = (
        path.flow_time(torch.tensor(u, dtype=F64)) for u in (float(state.t[0]), ladder.t_init)
    )
    t = path.time_of((tau**2 / start).reshape(1))
    mean, lam, basis = (part[0] for part in (teacher.means, teacher.variances, teacher.basis))
    low = torch.tensor(path.t_min, dtype=F64)

    def spread(u: Tensor) -> Tensor:
        return (path.alpha(u) ** 2 * lam + path.sigma(u) ** 2).sqrt()

    gain = path.alpha(t) * spread(low) / spread(t)  # of x about the mean, along each axis
    gain = gain * path.alpha(low) * lam / spread(low) ** 2
    by_hand = mean + ((x - mean) @ basis * gain) @ basis.T
    torch.testing.assert_close((target[:40] + target[40:]) / 2, by_hand, rtol=1e-6, atol=1e-9)
    assert float(gain.max()) < 0.99
    assert float((by_hand - x).abs().mean()) > 1e-2


def test_the_shift_is_none_at_the_start_and_large_at_the_end() -> None:
    """tau' = tau (tau / tau_T)^p, seen in what the teacher is asked."""
    teacher, exact, batch = scene("flow", "gaussian")
    seen: list[float] = []

    class Seen(nn.Module):
        path = Flow()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            seen.append(float(t[0]))
            out: Tensor = teacher(xt, t)
            return out

    spy: Any = Seen()
    m = method("flow", shift=2.0, steps=0)
    for k in (1, 2, 3):
        state = Rollout(m.sampler, k).state(Nets({"student": Ends(exact)}), batch)
        m.target(spy, state, batch)
    assert seen == pytest.approx([1.0, 8 / 27, 1 / 27], rel=1e-6)


def test_guidance_is_the_teachers() -> None:
    net: Any = stirred(Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2), 2).double()
    draws = Draws.range(0, 30)
    batch = Batch(draws.normal("z", (2,), F64), draws.integers("label", 3), None, draws)

    class Guided(nn.Module):
        path = net.path

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            free = net(xt, t, None)
            return free + 2.5 * (net(xt, t, cond) - free)  # type: ignore[no-any-return]

    m = method("flow", kappa=2.5)
    nets, guided = m.init(net, net), Guided()
    found = m.student_loss(Rollout(m.sampler, 2), nets, net, batch).total
    by_hand = loss(replace(m, kappa=1.0), 2, nets["student"], guided, batch)
    assert found is not None
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1.0}, "0 or more, or None"),
        ({"steps": -1}, "steps is 0 or more"),
        ({"order": 3}, "order is 1 or 2"),
        ({"steps": 0}, "what the student starts with"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagineFlash(**settings)
    with pytest.raises(ValueError, match="'uniform' or 'final'"):
        ImagineFlash(matching="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be trained through"):
        Rollout(Heun(), 1).state(Nets({"student": nn.Identity()}), Batch(torch.zeros(1, 1)))
