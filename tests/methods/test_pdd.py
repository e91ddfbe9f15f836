"""PDD: a student that knows every interval has no loss, on any teacher; wrong intervals have."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.methods.pdd import PDD
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
DRAWS = Draws.range(0, 24)
BATCH = Batch(DRAWS.normal("z", (2,), F64), None, None, DRAWS)


class Knowing(nn.Module):
    """A student whose heads are the teacher's own steps, from wherever it is called.

    lag: how many intervals late the teacher's step is; slow: the step is shorter by this share.
    """

    def __init__(self, m: PDD, teacher: Any, lag: int = 0, slow: float = 0.0) -> None:
        super().__init__()
        self.m, self.teacher, self.path, self.lag, self.slow = m, teacher, teacher.path, lag, slow
        self.head_count = m.finest.intervals

    def answers(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        m, count = self.m, self.m.finest.intervals
        tau = m.taus(self.teacher, xt)
        start = x = xt / m.size(self.teacher, t, xt)
        n = int((tau - self.path.flow_time(t[0])).abs().argmin())
        said = [start] * n
        for k in range(n, count):
            at = torch.full_like(t, min(k + self.lag, count - 1), dtype=torch.int64)
            u = (1 - self.slow) * m.mean_velocity(self.teacher, x, tau, at, BATCH)
            x = x - (tau[k] - tau[k + 1]) * u
            said.append(start - tau[n] * u)
        return torch.stack(said)

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, mix: Any = (1.0,)) -> Tensor:
        said = self.answers(xt, t)
        return torch.stack([c * g for c, g in zip(mix, said, strict=False)]).sum(0)


def worst(m: PDD, teacher: Any, **faults: Any) -> float:
    nets = Nets({"student": Knowing(m, teacher, **faults)})
    found = [m.student_loss(b, nets, teacher, BATCH).total for b in range(m.calls[1])]
    return max(float(loss) for loss in found if loss is not None)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("order", [1, 2])
def test_a_student_that_knows_the_intervals_has_no_loss(name: str, kind: str, order: Any) -> None:
    """To 1e-10 of float64, on its own states, from every block; others have."""
    path, start = STARTS[name]
    teacher = TEACHERS[kind](path)
    m = PDD(ParallelDecoding(start, 2, 4), (1, 2), order)
    assert worst(m, teacher) < 1e-10
    assert worst(m, teacher, lag=1) > 1e-3
    assert worst(m, teacher, slow=0.1) > 1e-3


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_calls_makes_the_solvers_samples(name: str, steps: int) -> None:
    """In 1, 2 or 4 calls those of 8 steps of DDIM; with the midpoint rule, nearer the flow."""
    path, start = STARTS[name]
    teacher = TEACHERS["gaussian"](path)
    sampler = ParallelDecoding(start, steps, 8)
    made, better = (
        sampler(Knowing(PDD(sampler, (steps, steps), order), teacher), BATCH.z)  # type: ignore[arg-type]
        for order in (1, 2)
    )
    torch.testing.assert_close(
        made, FewStep(start, 8, "ddim")(teacher, BATCH.z), rtol=1e-6, atol=1e-6
    )
    t = torch.full((24,), start, dtype=F64)
    exact = GaussianFlowMap(teacher)(BATCH.z * path.sigma(t[0]), t, s=0 * t)
    assert (better - exact).abs().max() < 0.5 * (made - exact).abs().max()


def test_golden_eight_euler_steps() -> None:
    """N(0, 1/4) on Flow: the factor of the map of 8 intervals, in 2 calls."""
    from fewstep.teachers.gaussian import Gaussian

    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), Flow())
    m = PDD(ParallelDecoding(1.0, 2, 8), (2, 4), 1)
    made = m.sampler(Knowing(m, teacher), torch.ones(1, 1, dtype=F64))
    assert float(made) == pytest.approx(0.41478455, abs=1e-8)


class Free(nn.Module):
    """g_k = c_k x_t, with the numbers c_k free."""

    def __init__(self, path: NoisePath, count: int) -> None:
        super().__init__()
        self.path = path
        self.gains = nn.Parameter(torch.linspace(0.1, 0.4, count, dtype=F64))
        self.head_count = count

    def answers(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.stack([c * xt for c in self.gains])


@pytest.mark.parametrize("top", [1.0, 0.6])
def test_an_interval_is_its_own_heads_alone(top: float) -> None:
    """The gradient of head k, by hand; none reaches the heads that lead to its state."""
    teacher = TEACHERS["gaussian"](Flow())
    m = PDD(ParallelDecoding(top, 1, 4), (1, 1), 1)
    student = Free(Flow(), 4)
    total = m.student_loss(0, Nets({"student": student}), teacher, BATCH).total
    assert total is not None
    (found,) = torch.autograd.grad(total, student.gains)
    k = DRAWS.integers("k", 4)
    z, want = top * BATCH.z, torch.zeros(4, dtype=F64)
    for i in range(4):
        x = z
        for j in range(i):
            x = x - 0.25 * (z - student.gains[j].detach() * z)
        tau = top * (1 - i / 4)
        u = (x - teacher(x, torch.full((24,), tau, dtype=F64))) / tau
        slope = 2 * (z - student.gains[i].detach() * z - top * u) * -z / top**2
        want[i] = slope[k == i].sum() / slope.numel()
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_blocks_and_their_reach() -> None:
    """Starts at multiples of N / most; the reach is N / fewest, or what is left."""
    m = PDD(ParallelDecoding(2.5, 2, 16), (2, 8))
    assert [m.reach(n) for n in range(0, 16, 2)] == [8, 8, 8, 8, 8, 6, 4, 2]
    assert {m.turns(step)[0].loss.args for step in range(100)} == {(b,) for b in range(8)}  # type: ignore[attr-defined]
    seen = {int(k) for k in DRAWS.integers("k", m.reach(12)) + 12}
    assert seen == {12, 13, 14, 15}


def test_times_are_those_of_one_ladder() -> None:
    sampler = ParallelDecoding(2.5, 2, 8, rho=3.0)
    times = sampler.times(VE())
    assert times[:-1] == FewStep(2.5, 8, rho=3.0).ladder(VE())
    assert sampler.ladder(VE()) == [times[0], times[4]]
    tau = sampler.flow_times(VE())
    assert tau == pytest.approx([t / (1 + t) for t in times])
    assert all(a > b for a, b in pairwise(tau))
    mix = sampler.mix(VE(), 4)
    assert mix[:4] == (0.0,) * 4
    assert sum(mix) == pytest.approx(1.0, rel=1e-12)
    assert mix[5] == pytest.approx((tau[5] - tau[6]) / tau[4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": FewStep(2.5)}, "is a ParallelDecoding"),
        ({"calls": (3, 4)}, "the fewest and most calls"),
        ({"calls": (1, 3)}, "the fewest and most calls"),
        ({"calls": (4, 4)}, "the fewest and most calls"),
        ({"order": 3}, "order is 1 or 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PDD(**settings)
