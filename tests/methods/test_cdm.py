"""CDM: grids of a step, decoupled DMD's two terms on them, and a term off the trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.losses.weight import L1, Power
from fewstep.methods.cdm import CDM, Grid
from fewstep.nets.mlp import MLP
from tests.methods.test_decoupled_dmd import SIGMA, A, B, Conditional, Fake
from tests.quadrature import F64, Line, batch

ONE = Grid((1.0,), 1)


class Heard(Line):
    """The student a + b z, which notes what it is given."""

    def __init__(self) -> None:
        super().__init__(A, B)
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.calls.append((xt, t, torch.is_grad_enabled()))
        return super().forward(xt, t, cond)


def method(**changes: Any) -> CDM:
    exact: dict[str, Any] = {"times": Discrete((SIGMA,)), "weight": Power(2, -2), "off": 0.0}
    return CDM(**exact | changes)


def loss(m: CDM, at: Batch, grid: Grid = ONE) -> tuple[Loss, Heard, Conditional]:
    student, teacher = Heard(), Conditional()
    at = at._replace(cond=torch.zeros(len(at.z), dtype=torch.int64))
    nets = Nets({"student": student, "fake": Fake()})
    return m.student_loss(grid, nets, teacher, at), student, teacher


def gradient(m: CDM) -> Tensor:
    found, student, _ = loss(m, batch(250))
    assert found.total is not None
    return student.gradient(found.total)


def test_on_the_trajectory_it_is_decoupled_dmd() -> None:
    """The golden gradients: KL to the conditional law, and the reward for the condition."""
    matching = gradient(method())
    assert matching.tolist() == pytest.approx([-1.4, 0.45405405], abs=2e-3)
    reward = gradient(method(kappa=4.0)) - matching
    assert reward.tolist() == pytest.approx([-4.537774, 3.3025698], rel=4e-3)


def random_batch(count: int) -> Batch:
    draws = Draws.range(0, count)
    return Batch(draws.normal("z", (1,), F64), None, None, draws)


def test_off_the_trajectory_the_push_is_on_the_second_output_alone() -> None:
    """By hand, from the calls that were made: x' keeps prediction and noise, without a graph."""
    m = method(times=Uniform(0.1, 2.4), weight=L1(0.1), off=0.7)
    found, student, teacher = loss(m, random_batch(60))
    plain, other, _ = loss(method(times=m.times, weight=m.weight), random_batch(60))
    assert found.total is not None
    assert plain.total is not None
    (xt, t, _), (moved, at, grad) = student.calls
    assert grad
    assert not moved.requires_grad
    with torch.no_grad():
        x = student(xt, t)
        eps = (xt - x) / t[:, None]
        torch.testing.assert_close(moved, x + at[:, None] * eps)
        share = VE().flow_time(at) / VE().flow_time(torch.tensor(2.5))
        assert 0.02 <= float(share.min()) < 0.1
        assert 0.9 < float(share.max()) <= 0.98
        y = student(moved, at)
        (own_xt, own_t, _), (yt, level, _) = teacher.calls
        told, fake = teacher.one(yt, level), Fake()(yt, level)
        push = (fake - told) / (y - told).abs().clamp_min(0.1)
        noises = torch.cat([(own_xt - x) / own_t[:, None], (yt - y) / level[:, None]], 1)
        assert float(torch.corrcoef(noises.T)[0, 1].abs()) < 0.4
        assert float(torch.corrcoef(torch.stack([own_t, level, at]))[0, 1:].abs().max()) < 0.4
        slope = moved / at[:, None]
        expected = 0.7 * torch.stack([push.mean(), (push * slope).mean()])
    found_gradient = student.gradient(found.total) - other.gradient(plain.total)
    torch.testing.assert_close(found_gradient, expected)
    assert float(found.logs["off_trajectory"]) == pytest.approx(float(push.abs().mean()))
    assert set(found.logs) - set(plain.logs) == {"off_trajectory"}
    assert set(plain.logs) == {"matching", "augmentation", "spread"}


def test_grids() -> None:
    """From 1 to `longest` calls, evenly; later times uniform in flow time."""
    m = CDM(longest=5)
    grids = [m.grid(step) for step in range(400)]
    lengths = torch.tensor([len(g.shares) for g in grids])
    assert torch.bincount(lengths, minlength=6)[1:].min() > 55
    assert lengths.max() == 5
    assert all(
        g.shares[0] == 1 and sorted(set(g.shares), reverse=True) == [*g.shares] for g in grids
    )
    later = torch.tensor([share for g in grids for share in g.shares[1:]])
    assert 0.25 <= float(later.min()) < 0.27
    assert 0.93 < float(later.max()) <= 0.95
    assert float(later.mean()) == pytest.approx(0.6, abs=0.03)
    whole = [g.k for g in grids if len(g.shares) == 5]
    assert torch.bincount(torch.tensor(whole), minlength=6)[1:].min() > 5
    assert m.grid(7) == m.grid(7)
    assert {turn.loss.args[0] for turn in m.turns(7)} == {m.grid(7)}  # type: ignore[attr-defined]
    assert [turn.net for turn in m.turns(7)] == ["fake", "fake", "student"]


@pytest.mark.parametrize(("path", "start"), [(VE(), 2.5), (Flow(), 1.0), (VP(), 999.0)])
def test_a_grid_on_a_path(path: NoisePath, start: float) -> None:
    rollout = Grid((1.0, 0.8, 0.799999, 0.3), 4).rollout(start, path)
    sampler: Any = rollout.sampler
    assert sampler.noise == "ddim"
    times = sampler.ladder(path)
    assert times[0] == start
    whole = isinstance(path, VP)
    assert rollout.k == len(times) == (3 if whole else 4)
    share = path.flow_time(torch.tensor([times[1], times[-1], start], dtype=F64))
    found = (share / share[2])[:2].tolist()
    assert found == pytest.approx([0.8, 0.3], abs=2e-3 if whole else 1e-6)


def test_a_rollout_follows_its_grid() -> None:
    """Two calls without a gradient, the third with one, each where the last one's noise leads."""
    found, student, _ = loss(method(), random_batch(6), Grid((1.0, 0.7, 0.4), 3))
    assert found.total is not None
    assert [grad for *_, grad in student.calls] == [False, False, True]
    (first, t, _), (second, s, _), _ = student.calls
    with torch.no_grad():
        x = student(first, t)
    torch.testing.assert_close(second, x + s[:, None] * (first - x) / t[:, None])


def test_the_students_weights_are_mixed_into_the_fake_score() -> None:
    net = Model(MLP(width=8, blocks=1), (2,)).build(0)
    nets = CDM().init(None, net)
    for p in nets["student"].parameters():
        p.data += 1.0
    before = [p.clone() for p in nets["fake"].parameters()]
    step = Step(nets, nets["student"], 0, 0, 4, {})
    CDM(pull=1.0).after_step(step)
    assert all(torch.equal(p, q) for p, q in zip(nets["fake"].parameters(), before, strict=True))
    CDM(pull=0.9).after_step(step)
    for p, q in zip(nets["fake"].parameters(), before, strict=True):
        torch.testing.assert_close(p, q + 0.1)
    other: nn.Module = Model(MLP(width=16, blocks=1), (2,)).build(0)
    with pytest.raises(ValueError, match=r"say pull=1.0"):
        CDM().init(other, net)  # type: ignore[arg-type]
    assert set(CDM(pull=1.0).init(other, net)) == {"student", "fake"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep(2.5, 4)}, "noise='ddim'"),
        ({"ratio": 0}, "1 or more"),
        ({"longest": 0}, "longest >= 1"),
        ({"off": -1.0}, "off >= 0"),
        ({"pull": 0.0}, "0 < pull"),
        ({"between": (0.9, 0.5)}, "increasing shares"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CDM(**changes)
