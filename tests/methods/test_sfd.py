"""SFD on a Gaussian: the teacher's own states, and the way back to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.samplers import FewStep, Heun, Jumps
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.losses.distance import SquaredL2
from fewstep.methods.sfd import SFD
from fewstep.teachers.gaussian import Gaussian
from tests.gaussians import GaussianFlowMap
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, FewStep]] = {
    "ve": (VE(), FewStep(2.5, 4, "ddim", rho=2.0)),
    "flow": (Flow(), FewStep(1.0, 4, "ddim")),
    "trig": (TrigFlow(), FewStep(1.5, 4, "ddim", rho=1.3)),
    "vp": (VP(), FewStep(999.0, 4, "ddim")),
}
each_path = pytest.mark.parametrize("name", STARTS)
Z = torch.tensor([[1.0], [-0.3]], dtype=F64)
BATCH = Batch(Z)


def gaussian(path: NoisePath) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)


class Gains(nn.Module):
    """g = c(t) x_t with a free number c for each time."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path, self.table = path, nn.ParameterDict()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt * self.table[key(t)]


def key(t: Tensor) -> str:
    return f"{float(t[0]):.9g}".replace(".", "_")


def fitted(m: SFD, path: NoisePath, off: float = 0.0) -> tuple[Gains, list[float]]:
    """The student that sends every call to the teacher's state, but the first `off` it; losses."""
    student, losses = Gains(path), []
    nets, teacher = Nets({"student": student}), gaussian(path)
    ladder = m.sampler.ladder(path)  # type: ignore[attr-defined]
    for k, time in enumerate(ladder, 1):
        gain = nn.Parameter(torch.tensor(0.0, dtype=F64))
        student.table[key(torch.tensor([time], dtype=F64))] = gain
        for target in (m.target(k, teacher, BATCH),) * 2:  # the state is linear in the gain
            apart = m.state(k, nets, BATCH).xs - target
            (slope,) = torch.autograd.grad(apart[0, 0], gain)
            gain.data -= apart[0, 0].detach() / slope
        gain.data += off * (k == 1)
        total = m.student_loss(k, nets, teacher, BATCH).total
        assert total is not None
        losses.append(float(total.detach()))
    return student, losses


@each_path
@pytest.mark.parametrize("solver", ["heun", "dpm++", "unipc"])
def test_the_student_ends_where_the_teacher_does(name: str, solver: Any) -> None:
    path, sampler = STARTS[name]
    m = SFD(sampler, solver=solver)
    student, losses = fitted(m, path)
    assert max(losses) < 1e-9
    made = sampler(student, Z).detach()
    teacher = m.teacher_sampler(path)(gaussian(path), Z)
    torch.testing.assert_close(made, teacher, rtol=1e-9, atol=1e-9)
    plain = sampler(gaussian(path), Z)
    start = float(path.sigma(torch.tensor(sampler.t_init, dtype=F64)))
    exact = GaussianFlowMap(gaussian(path))
    t = torch.full((2,), sampler.t_init, dtype=F64)
    end = exact(Z * start, t, s=torch.zeros_like(t))
    assert (teacher - end).abs().max() < 0.35 * (plain - end).abs().max()


@each_path
def test_later_calls_mend_the_errors_of_earlier_ones(name: str) -> None:
    """The first call off by 0.05: all others still end on the teacher's path, from elsewhere."""
    path, sampler = STARTS[name]
    m = SFD(sampler)
    right, _ = fitted(m, path)
    student, losses = fitted(m, path, off=0.05)
    assert losses[0] > 1e-4
    assert max(losses[1:]) < 1e-9
    torch.testing.assert_close(sampler(student, Z).detach(), sampler(right, Z).detach())
    second = list(right.table)[1]
    assert abs(float((student.table[second] - right.table[second]).detach())) > 1e-3


@each_path
def test_without_times_between_the_teacher_is_the_first_order_solver(name: str) -> None:
    """Heun's last step is the student's, which then need not change."""
    path, sampler = STARTS[name]
    m = SFD(sampler, between=0, solver="heun")
    teacher = gaussian(path)
    for k in range(1, 5):
        heun = m.target(k, teacher, BATCH)
        ddim = m.state(k, Nets({"student": teacher}), BATCH).xs
        assert (heun - ddim).abs().max() > 1e-3


def test_targets_are_the_states_of_the_solver() -> None:
    """X_k is the k-th next input of the solver with as many times as the student; X_K the data."""
    path, sampler = STARTS["ve"]
    m = SFD(sampler, between=0, distance=SquaredL2())
    states = list(m.teacher_sampler(path).states(gaussian(path), Z))
    for k in range(1, 5):
        assert torch.equal(m.target(k, gaussian(path), BATCH), states[k - 1].xs)
    assert torch.equal(m.target(4, gaussian(path), BATCH), states[-1].x0)
    wide = SFD(sampler, between=3)
    states = list(wide.teacher_sampler(path).states(gaussian(path), Z))
    assert len(states) == 16
    for k in range(1, 5):
        assert torch.equal(wide.target(k, gaussian(path), BATCH), states[4 * k - 1].xs)


def test_one_call_has_a_gradient() -> None:
    path, sampler = STARTS["ve"]
    m = SFD(sampler)
    student, _ = fitted(m, path)
    nets = Nets({"student": student})
    for k in range(1, 5):
        total = m.student_loss(k, nets, gaussian(path), BATCH._replace(z=Z + 0.1)).total
        assert total is not None
        found = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
        assert [g is not None for g in found] == [i == k for i in range(1, 5)]


def test_there_is_an_update_for_each_interval() -> None:
    """And guidance is the teacher's."""
    m = SFD(kappa=2.0)
    assert [turn.loss.args for turn in m.turns(0)] == [(1,), (2,), (3,), (4,)]  # type: ignore[attr-defined]
    assert isinstance(m.teacher_sampler(VE()), CFG)
    assert isinstance(SFD(solver="heun").teacher_sampler(VE()), Heun)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": FewStep(2.5, 4)}, "is a FewStep"),
        ({"sampler": Jumps(2.5, 4)}, "is a FewStep"),
        ({"between": -1}, "is 0 or more"),
        ({"solver": "euler"}, "'heun', 'dpm"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFD(**settings)


@each_path
def test_a_target_of_heun_is_the_corrected_end_of_its_interval(name: str) -> None:
    """Two intervals a call: the fourth state, after two corrections, and the last."""
    path, sampler = STARTS[name]
    m, teacher = SFD(sampler, 1, "heun"), gaussian(path)
    states = list(m.teacher_sampler(path).states(teacher, Z))
    assert torch.equal(m.target(1, teacher, BATCH), states[3].xs)
    assert not torch.equal(states[3].xs, states[2].xs)
    assert torch.equal(m.target(4, teacher, BATCH), states[-1].xs)
