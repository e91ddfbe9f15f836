"""pi-Flow: the exact policy of a mixture has no loss; the teacher is asked along the own way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow
from fewstep.diffusion.policies import DX, FollowPolicy, GMFlow, scaled
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.methods.pi_flow import PiFlow
from fewstep.nets.mlp import MLP
from tests.diffusion.test_policies import STARTS, Posterior, mixture
from tests.quadrature import F64

DRAWS = Draws.range(0, 40)
BATCH = Batch(DRAWS.normal("z", (2,), F64), None, None, DRAWS)
each_path = pytest.mark.parametrize("name", STARTS)


def loss(m: PiFlow, student: Any, teacher: Any, k: int = 1, share: float = 0.0) -> float:
    total = m.student_loss(k, share, Nets({"student": student}), teacher, BATCH).total
    assert total is not None
    return float(total.detach())


@each_path
@pytest.mark.parametrize("k", [1, 2])
def test_the_exact_policy_has_no_loss(name: str, k: int) -> None:
    """On its own way in both segments, at all states, to 1e-9; one of another spread has."""
    path, start = STARTS[name]
    m = PiFlow(FollowPolicy(start, 2, policy=GMFlow(3), substeps=8), states=3, dropout=0.0)
    assert loss(m, Posterior(path), mixture(path), k) < 1e-9
    assert loss(m, Posterior(path, 0.5), mixture(path), k) > 1e-5


@each_path
def test_the_mean_velocity_of_small_steps_is_the_teachers(name: str) -> None:
    """Mixed with the teacher, and over a window, to first order in the step."""
    path, start = STARTS[name]
    found = []
    for substeps in (32, 64):
        sampler = FollowPolicy(start, 2, policy=GMFlow(3), substeps=substeps)
        m = PiFlow(sampler, states=2, dropout=0.0, window=1)
        found.append(loss(m, Posterior(path), mixture(path)))
    assert found[0] < 1e-9  # one substep of Euler is the velocity at its start
    m = PiFlow(FollowPolicy(start, 2, policy=GMFlow(3)), states=16, dropout=0.0)
    assert loss(m, Posterior(path), mixture(path), share=1.0) < 0.05
    assert loss(m, Posterior(path, 1.5), mixture(path), share=1.0) > 1.5 * loss(
        m, Posterior(path), mixture(path), share=1.0
    )


class Fixed(nn.Module):
    """Heads that are given numbers, whatever the state."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.path = Flow()
        self.numbers = nn.Parameter(torch.tensor(numbers, dtype=F64))
        self.head_count = len(numbers)

    def answers(self, xt: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self.numbers[:, None, None].expand(-1, *xt.shape)


def test_the_loss_by_hand() -> None:
    """One frozen x_0 = c: the own way is a line, and the loss |c - f|^2 / tau^2 along it."""
    teacher = mixture(Flow())
    m = PiFlow(FollowPolicy(0.9, policy=DX(2)), states=2)
    student = Fixed(0.3, 0.3)
    total = m.student_loss(1, 0.0, Nets({"student": student}), teacher, BATCH).total
    assert total is not None
    (slope,) = torch.autograd.grad(total, student.numbers)
    ways = torch.stack([DRAWS.uniform(f"own{i}").double() for i in range(2)]).sort(0).values
    want, pull = 0.0, 0.0
    for way in ways:
        tau = (0.9 * (1 - way))[:, None]
        x = 0.3 + (BATCH.z * 0.9 - 0.3) * tau / 0.9
        f = teacher(x, tau[:, 0])
        want += float(((0.3 - f) ** 2 / tau**2).mean()) / 2
        pull += float((2 * (0.3 - f) / tau**2).mean()) / 2
    assert float(total.detach()) == pytest.approx(want, rel=1e-6)
    assert float(slope.sum()) == pytest.approx(pull, rel=1e-6)  # the way itself has no gradient


def test_the_way_is_the_teachers_by_its_share() -> None:
    """By hand: a line to c, then a step of Euler to the teacher's f, and so on."""
    teacher, share = mixture(Flow()), 0.5
    m = PiFlow(FollowPolicy(0.9, policy=DX(2)), states=3)
    student = Fixed(0.3, 0.3)
    _, _, source = m.segment(1, student, BATCH)
    x, tau, want = source.x, source.tau, 0.0
    for stretch in m.stretches(share, source, BATCH):
        at = tau - stretch.own
        x = 0.3 + (x - 0.3) * at / tau
        f = teacher(x, at[:, 0])
        want += float(((0.3 - f) ** 2 / at**2).mean()) / 3
        tau = at - stretch.teacher
        x = f + (x - f) * tau / at
    assert loss(m, student, teacher, share=share) == pytest.approx(want, rel=1e-6)


def test_segments_are_weighted_by_their_length() -> None:
    m = PiFlow(FollowPolicy(0.9, 2, rho=2.0, policy=DX(2)))
    for k, length in ((1, 0.75), (2, 0.25)):
        made = m.student_loss(k, 0.0, Nets({"student": Fixed(0.3, 0.3)}), mixture(Flow()), BATCH)
        assert made.total is not None
        ratio = float(made.total.detach() / made.logs[f"segment_{k}"])
        assert ratio == pytest.approx(2 * length, rel=1e-9)


def test_the_second_segment_starts_where_the_first_policy_ends() -> None:
    m = PiFlow(FollowPolicy(0.9, 2, policy=GMFlow(3)))
    student: Any = Posterior(Flow())
    first, _ = m.follow.states(student, BATCH.z)
    xt, t, source = m.segment(2, student, BATCH)
    torch.testing.assert_close(xt, first.xs)
    assert float(t[0]) == pytest.approx(0.45)
    assert float(source.end[0]) == 0
    torch.testing.assert_close(source.x, scaled(Flow(), xt, t)[0])
    xt, t, source = m.segment(1, student, BATCH)
    assert torch.equal(xt, 0.9 * BATCH.z)
    assert float(source.end[0]) == pytest.approx(0.45)


def test_the_way_is_shared_out() -> None:
    """In order, within the segment less the window; all of the teacher's share is gone."""
    m = PiFlow(FollowPolicy(0.8, policy=DX(2), substeps=10), states=3, window=2)
    _, _, source = m.segment(1, Fixed(0.1, 0.2), BATCH)
    for share in (0.0, 0.25, 1.0):
        steps = m.stretches(share, source, BATCH)
        own = torch.stack([step.own for step in steps]).sum(0)
        teacher = torch.stack([step.teacher for step in steps]).sum(0)
        torch.testing.assert_close(teacher, torch.full_like(teacher, share * 0.64))
        assert bool((own <= (1 - share) * 0.64 + 1e-12).all())
        assert all(bool((step.own >= 0).all()) for step in steps)
        assert share == 1.0 or own.mean() > 0.5 * (1 - share) * 0.64
    assert PiFlow().turns(7)[0].loss.args == (1, 0.0)  # type: ignore[attr-defined]
    mixing = PiFlow(mixing_steps=10)
    shares = [mixing.turns(step)[0].loss.args[1] for step in (0, 4, 10, 50)]  # type: ignore[attr-defined]
    assert shares == pytest.approx([1.0, 0.6, 0.0, 0.0])


def test_components_are_dropped_but_never_all() -> None:
    m = PiFlow(FollowPolicy(0.9, policy=GMFlow(2)), dropout=0.9)
    gone = m.dropped(BATCH)
    assert gone is not None
    assert gone.shape == (40, 2)
    assert not bool(gone.all(1).any())
    assert 0.02 < float(gone.double().mean()) < 0.2
    assert PiFlow(FollowPolicy(0.9, policy=DX(2))).dropped(BATCH) is None


def test_the_student_starts_as_the_teachers_step_with_means_apart() -> None:
    model = Model(MLP(8, 1), (2,))
    net: Any = model.build()
    m = PiFlow(FollowPolicy(2.5, policy=GMFlow(3)))
    student: Any = m.init(net, net)["student"]
    assert m.result(model).heads == 7
    biases = torch.stack([layer.bias for layer in student.layers])
    assert torch.equal(biases[3:], net.net.last.bias.expand(4, -1))
    assert 0.01 < (biases[:3] - net.net.last.bias).std().item() < 0.12
    z = BATCH.z.float()
    with torch.no_grad():
        torch.testing.assert_close(m.sampler(student, z), FewStep(2.5)(net, z), rtol=0.3, atol=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": FewStep(2.5)}, "is a FollowPolicy"),
        ({"states": 0}, "states of 1 or more and a dropout below 1"),
        ({"dropout": 1.0}, "states of 1 or more and a dropout below 1"),
        ({"window": 32}, "window is from 0 to below"),
        ({"mixing_steps": -1}, "window is from 0 to below"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PiFlow(**settings)
    assert math.isclose(float(PiFlow().whole(VE(), BATCH.z)), 2.5 / 3.5, rel_tol=1e-6)
