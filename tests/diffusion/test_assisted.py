"""Help at inference: closed forms on Gaussians, values by hand, and who is asked when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.config import parse
from fewstep.diffusion.assisted import (
    Agreement,
    Assisted,
    Corrected,
    Gated,
    Handover,
    Oracle,
    down_to,
)
from fewstep.diffusion.guidance import CFG, AtScale
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete, Uniform
from fewstep.diffusion.types import Cond
from fewstep.teachers.gaussian import Gaussian
from tests.methods.test_battery import network

F64 = torch.float64
MU, V = 1.0, 0.25
COUNT = 20_000
DRAWS = Draws.range(0, COUNT)
Z = DRAWS.normal("z", (1,), F64)


def teacher(path: NoisePath = VE()) -> Gaussian:
    return Gaussian(torch.tensor([MU], dtype=F64), torch.tensor([[V]], dtype=F64), path)


class Wide(nn.Module):
    """A student that makes N(0.4, 0.49) of pure noise, whatever it is called at."""

    def __init__(self, path: NoisePath = VE()) -> None:
        super().__init__()
        self.path, self.times = path, list[float]()

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        self.times.append(float(t.flatten()[0]))
        z = xt / self.path.sigma(t)[:, None]
        return 0.4 + 0.7 * z


class Ends(nn.Module):
    """The exact flow to the data; at its first call `collapsed`, the mean alone."""

    def __init__(self, top: float, collapsed: bool) -> None:
        super().__init__()
        self.path, self.top, self.collapsed = VE(), top, collapsed

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        at = float(t.flatten()[0])
        if self.collapsed and at == self.top:
            return torch.full_like(xt, MU)
        return MU + math.sqrt(V / (V + at**2)) * (xt - MU)


def moments(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.var())


def test_a_corrected_prediction_by_hand_and_in_moments() -> None:
    """Mean error times 1 - lam (1 - k), variance (1 - lam (1 - k))^2 v + lam^2 k^2 s^2."""
    lam, s = 0.4, 1.2
    k = V / (V + s**2)
    student = Wide()
    sampler = Corrected(lam, 1, FewStep(times=(2.5, s), noise="ddim"))
    first, last = sampler.states(Assisted(student, teacher()), Z, None, DRAWS)
    plain = 0.4 + 0.7 * Z
    eps = DRAWS.normal("corrected1", (1,)).to(F64)
    told = MU + k * (plain + s * eps - MU)
    torch.testing.assert_close(first.x0, (1 - lam) * plain + lam * told, rtol=1e-9, atol=1e-9)
    mean, variance = moments(first.x0)
    assert mean - MU == pytest.approx((1 - lam * (1 - k)) * (0.4 - MU), rel=0.03)
    expected = (1 - lam * (1 - k)) ** 2 * 0.49 + (lam * k * s) ** 2
    assert variance == pytest.approx(expected, rel=0.03)
    moved = VE().ddim(first.xt, first.x0, first.t, first.s)
    torch.testing.assert_close(last.xt, moved, rtol=1e-12, atol=1e-12)
    assert torch.equal(last.x0, Wide()(last.xt, last.t))
    assert student.times == [2.5, s]
    assert sampler.calls == 3


def test_it_is_not_neutral() -> None:
    """The variance of an exact student shrinks by 1 - lam (2 - lam) (1 - k): 0.455 here."""
    lam, s = 0.4, 1.2
    exact = Assisted(Ends(2.5, False), teacher())
    noise = (2.5**2 + V) ** 0.5 / 2.5 * Z + MU / 2.5  # states of the exact law at t = 2.5
    first = next(Corrected(lam, 1, FewStep(times=(2.5, s))).states(exact, noise, None, DRAWS))
    k = V / (V + s**2)
    assert 1 - lam * (2 - lam) * (1 - k) == pytest.approx(0.455, abs=1e-3)
    assert moments(first.x0)[1] / V == pytest.approx(0.455, rel=0.03)


def test_a_handover_restores_what_a_collapsed_call_loses() -> None:
    """V t_2^2 / (V + t_2^2) of the student alone, V with the teacher's first step."""
    both = Assisted(Ends(10.0, True), teacher())
    student = FewStep(times=(10.0, 2.0))
    alone = student(both, Z, None, DRAWS)
    assert moments(alone)[1] == pytest.approx(V * 4 / (V + 4), rel=0.03)
    assert round(V * 4 / (V + 4), 4) == 0.2353
    sampler = Handover(40, 1, 10.0, student)
    helped = sampler(both, Z, None, DRAWS)
    flow = teacher().flow(10.0 * Z, 10.0, 2.0)
    expected = Ends(10.0, True)(flow, torch.full((COUNT,), 2.0, dtype=F64))
    torch.testing.assert_close(helped, expected, rtol=1e-3, atol=2e-3)
    assert moments(helped)[1] == pytest.approx(V, rel=0.03)
    assert sampler.calls == 41


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=lambda p: type(p).__name__)
def test_a_handover_is_a_chain_on_every_path(path: NoisePath) -> None:
    """Teacher at its times, student from the rung on; nothing is lost in between."""
    end = 0.4 if not isinstance(path, VP) else 400.0
    student = Wide(path)
    sampler = Handover(3, 1, None, FewStep(times=(2 * end, end), noise="ddim"))
    z = Z[:8]
    states = list(sampler.states(Assisted(student, teacher(path)), z))
    assert [float(state.t[0]) for state in states][-1] == pytest.approx(end)
    assert student.times == pytest.approx([end])
    solver = down_to(path, end, 3)
    before = list(solver.states(teacher(path), z))
    torch.testing.assert_close(states[-1].xt, before[2].xs, rtol=1e-9, atol=1e-9)
    assert states[0].t[0] == path.t_max
    flown = teacher(path).flow(states[0].xt, path.t_max, end)
    fine = list(down_to(path, end, 200).states(teacher(path), z))[199].xs
    torch.testing.assert_close(fine, flown, rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class Largest(Oracle):
    """Small samples are good."""

    def __call__(self, both: Assisted, x: Tensor, cond: Cond, draws: Draws) -> Tensor:
        return -x[:, 0]


def test_poor_samples_alone_are_worked_over() -> None:
    """The others are the student's, bit for bit; thresholds at the ends take all or none."""
    both = Assisted(Wide(), teacher())
    gate = Gated(-0.4, 1.2, 5, Largest(), FewStep())
    plain, x = FewStep()(both, Z, None, DRAWS), gate(both, Z, None, DRAWS)
    poor = plain[:, 0] > 0.4
    assert torch.equal(x[~poor], plain[~poor])
    assert (x[poor] != plain[poor]).all()
    assert torch.equal(replace(gate, threshold=-math.inf)(both, Z, None, DRAWS), plain)
    limit = gate.calibrated(both, Z, None, DRAWS, 0.25).threshold
    assert limit is not None
    assert float((-plain[:, 0] < limit).double().mean()) == pytest.approx(0.25, abs=1e-3)
    assert gate.calls == 6
    assert Gated().calls == 1 + 1 + 4


def test_refinement_in_moments() -> None:
    """Mean error times (V / (V + s^2))^(1/2), variance V (v + s^2) / (V + s^2)."""
    s = 1.2
    gate = Gated(math.inf, s, 60, Largest(), FewStep())
    x = gate(Assisted(Wide(), teacher()), Z, None, DRAWS)
    mean, variance = moments(x)
    assert mean - MU == pytest.approx((0.4 - MU) * math.sqrt(V / (V + s**2)), rel=0.05)
    assert variance == pytest.approx(V * (0.49 + s**2) / (V + s**2), rel=0.03)


@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=lambda p: type(p).__name__)
def test_agreement_is_the_teacher_s_change(path: NoisePath) -> None:
    """Of samples far from the data it is lower; the value by hand."""
    both, draws = Assisted(Wide(path), teacher(path)), Draws.range(0, 64)
    x = torch.linspace(-1.0, 3.0, 64, dtype=F64)[:, None]
    scores = Agreement(0.5)(both, x, None, draws)
    eps = draws.normal("agreement", (1,)).to(F64)
    k = V / (V + 0.25)
    told = MU + k * (x + 0.5 * eps - MU)  # E[x_0 | x_t] depends on the noise level alone
    torch.testing.assert_close(scores, -((told - x) ** 2)[:, 0], rtol=0.02, atol=2e-3)
    assert scores[:8].mean() < scores[28:36].mean() - 0.3


def test_the_interval_of_guidance() -> None:
    """Guided inside (above, upto], conditional outside, and the calls that are made."""
    net: Any = network(0).double().requires_grad_(False)
    z, labels = Draws.range(0, 6).normal("z", (2,), F64), torch.arange(6) % 3
    law, calls = Discrete((0.2, 0.5, 1.0, 2.0)), list[Any]()

    class Heard(nn.Module):
        path = net.path

        def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
            calls.append((float(t.flatten()[0]), cond is None))
            out: Tensor = net(xt, t, cond)
            return out

    CFG(Heun(law, 4, 1), 3.0, 0.2, 1.0)(Heard(), z, labels)
    assert [t for t, free in calls if free] == [1.0, 0.5]
    assert [t for t, free in calls if not free] == [2.0, 1.0, 0.5, 0.2]
    guide, full = AtScale(net, 3.0, 0.2, 1.0), AtScale(net, 3.0)
    t = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.1, 1.5], dtype=F64)
    inside = torch.tensor([False, True, True, False, False, False])
    expected = torch.where(inside[:, None], full(z, t, labels), net(z, t, labels))
    torch.testing.assert_close(guide(z, t, labels), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(full(z, t, labels), net(z, t, labels))
    assert repr(CFG(Heun(Uniform(0.1, 1.0)), 2.0)) == repr(parse("CFG(Heun(Uniform(.1,1)),2.)"))
    for bad in ((-1.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="CFG guides at noise levels above one of 0 or more"):
            CFG(Heun(), 2.0, *bad)


@pytest.mark.parametrize("sampler", [Corrected(), Handover(), Gated(-0.1)], ids=repr)
def test_they_are_written_and_read(sampler: Any) -> None:
    assert parse(repr(sampler)) == sampler
    assert not sampler.trainable
    with pytest.raises(ValueError, match="asks the student's teacher too: sample Assisted"):
        list(sampler.states(Wide(), Z[:2], None, Draws.range(0, 2)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Corrected(1.5), "Corrected needs a strength from 0 to 1"),
        (lambda: Corrected(0.4, 2), "corrects 1 or more calls but not the last"),
        (lambda: Corrected(sampler=FewStep()), "corrects 1 or more calls but not the last"),
        (lambda: Handover(sampler=Heun()), "Handover goes on with a FewStep"),
        (lambda: Handover(sampler=FewStep(steps=2, noise="fixed")), "Handover goes on with a Few"),
        (lambda: Handover(sampler=FewStep()), "Handover needs steps of 1 or more, and at from"),
        (lambda: Handover(0), "Handover needs steps of 1 or more, and at from"),
        (lambda: Gated(level=0.0), "Gated needs a level above 0"),
        (lambda: Gated(steps=0), "Gated needs a level above 0"),
        (lambda: Assisted(Wide(VE()), teacher(Flow())), "the teacher is on another noise path"),
        (lambda: down_to(VE(), 2.0, 3, 1.0), "the teacher starts above the time it ends at, 2"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_what_is_missing_is_asked_for() -> None:
    both = Assisted(Wide(), teacher())
    with pytest.raises(ValueError, match="Gated needs a threshold: give one, or find it by"):
        list(Gated().states(both, Z[:2], None, Draws.range(0, 2)))
    for sampler in (Corrected(), Gated(0.0)):
        with pytest.raises(ValueError, match="draws"):
            list(sampler.states(both, Z[:2]))
