"""Rewarded: where distillation and reward balance, and what is left to the method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import config
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete, Karras
from fewstep.diffusion.types import Cond
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn
from fewstep.distillation.pairs import Pairs
from fewstep.distillation.pictures import Reward, give_decoder
from fewstep.eval.picture_networks import Ink
from fewstep.losses.weight import Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.f_distill import FDistill
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.rewarded import Rewarded
from fewstep.methods.sid import SiD
from fewstep.recipes.digits import digits
from fewstep.runs.teacher import resolve_run
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line, batch

MU, V, LAM = 1.0, 0.25, 0.3


@dataclass(frozen=True)
class Slope(Reward):
    """r = x, the mean of a picture."""

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        return pictures.flatten(1).mean(1)


BOWL = Ink(1.5, 8**-0.5)
"""-(x - 2)^2 of a picture of one pixel: H = 2 and m = 2."""


def gaussian(mean: float, variance: float) -> Gaussian:
    """N(mean, variance), whose decoder makes pictures of one pixel."""
    found = Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), VE())
    give_decoder(found, lambda x: x[:, :, None, None])
    return found


def gradient(a: float, b: float, t: float, reward: Reward, weight: float = LAM) -> Tensor:
    """d/d(a, b) of KL(p_t || q_t) - weight E r for the student a + b z, the fake score exact."""
    inner = DiffInstruct(FewStep(80.0), Discrete((t,)), Power(2, -2))
    student = Line(a, b)
    nets = Nets({"student": student, "fake": gaussian(a, b**2)})
    turn = Rewarded(inner, reward, weight).turns(0)[-1]
    total = turn.loss(nets, gaussian(MU, V), batch(40)).total
    assert total is not None
    return student.gradient(total)


@pytest.mark.parametrize(
    ("levels", "shift"), [((0.05,), 0.07575), ((2.5,), 1.95), ((0.3, 1.0, 2.5), 0.07702)]
)
def test_a_linear_reward_shifts_the_mean_by_what_the_levels_hold(
    levels: tuple[float, ...], shift: float
) -> None:
    """The golden shifts, and no change of the spread; control: the tilt of the data, lambda V."""
    exact = LAM / sum(1 / (V + t * t) for t in levels)
    assert exact == pytest.approx(shift, rel=2e-4)

    def whole(a: float) -> Tensor:
        parts = [gradient(a, V**0.5, t, Slope(), LAM / len(levels)) for t in levels]
        return torch.stack(parts).sum(0)

    assert float(whole(MU + exact).abs().max()) < 1e-12
    off = float(whole(MU + LAM * V)[0])
    assert off == pytest.approx(-LAM * (1 - LAM * V / exact), abs=1e-12)
    assert (abs(off) > 0.25) == (levels == (2.5,))


def test_a_quadratic_reward_ends_at_the_tilted_gaussian() -> None:
    """1/(b^2 + t^2) = 1/(V + t^2) + lambda H and the mean that weighs both; golden at t = 0."""
    h, m = 2.0, 2.0
    for t in (0.01, 0.3):
        hold = 1 / (V + t * t)
        variance = 1 / (hold + LAM * h) - t * t
        mean = (hold * MU + LAM * h * m) / (hold + LAM * h)
        assert float(gradient(mean, variance**0.5, t, BOWL).abs().max()) < 1e-11
        near = t == 0.01
        assert (mean == pytest.approx(1.13043, abs=2e-4)) == near
        assert (variance == pytest.approx(0.217391, abs=2e-4)) == near


def test_descent_finds_it_and_without_the_method_there_is_no_end() -> None:
    """From the teacher's own law; a reward alone pushes as hard wherever it has come to."""
    t, a, b = 0.3, MU, V**0.5
    for _ in range(60):
        a, b = (
            float(v - 0.1 * g) for v, g in zip((a, b), gradient(a, b, t, Slope()), strict=True)
        )
    assert a == pytest.approx(MU + LAM * (V + t * t), abs=1e-6)
    assert b == pytest.approx(V**0.5, abs=1e-12)
    for far in (0.0, 10.0, 1000.0):
        reward = gradient(MU + far, 0.5, t, Slope(), 1.0) - gradient(
            MU + far, 0.5, t, Slope(), 0.5
        )
        assert reward.tolist() == pytest.approx([-0.5, 0.0], abs=1e-9)


def test_nothing_is_pushed_beyond_the_ceiling() -> None:
    """Half of the samples are above it: half of the push, and none where all are."""

    def push(ceiling: float | None) -> Tensor:
        inner = DiffInstruct(FewStep(80.0), Discrete((1.0,)), Power(2, -2))
        nets = Nets({"student": Line(MU, 0.5), "fake": gaussian(MU, V)})
        method = Rewarded(inner, Slope(), LAM, ceiling=ceiling)
        student: Any = nets["student"]
        loss = method.turns(0)[-1].loss(nets, gaussian(MU, V), batch(40))
        assert float(loss.logs["reward"].detach()) == pytest.approx(MU, abs=1e-12)
        assert float(loss.logs["reward_std"].detach()) == pytest.approx(0.5, abs=1e-12)
        assert loss.total is not None
        return student.gradient(loss.total)

    assert float(push(None)[0]) == pytest.approx(-LAM, abs=1e-12)
    assert float(push(MU)[0]) == pytest.approx(-LAM / 2, abs=1e-12)
    assert float(push(MU - 9)[0]) == pytest.approx(0.0, abs=1e-12)


def test_a_second_scorer_is_logged_and_not_learned() -> None:
    nets = Nets({"student": Line(0.2, 0.8), "fake": gaussian(0.2, 0.64)})
    inner, student = DiffInstruct(FewStep(80.0)), nets["student"]
    assert isinstance(student, Line)
    found = []
    for held_out in (None, BOWL):
        turn = Rewarded(inner, Slope(), held_out=held_out).turns(0)[-1]
        loss = turn.loss(nets, gaussian(MU, V), batch(40))
        assert loss.total is not None
        found.append(student.gradient(loss.total))
    assert torch.equal(*found)
    assert float(loss.logs["held_out"]) == pytest.approx(-(1.8**2) - 0.64, abs=1e-9)


def test_the_reward_begins_at_its_step_and_on_the_student_alone() -> None:
    method = Rewarded(DMD2(ratio=2), Slope(), start=3)
    assert repr(method.turns(2)) == repr(list(DMD2(ratio=2).turns(2)))
    before, now = DMD2(ratio=2).turns(3), method.turns(3)
    assert [turn.net for turn in now] == [turn.net for turn in before]
    same = [repr(a) == repr(b) for a, b in zip(before, now, strict=True)]
    assert same == [turn.net == "fake" for turn in before]


@dataclass(frozen=True)
class Scored(Method):
    """A method of the loss 3 a, with sums and a rate of its own."""

    sampler: FewStep = FewStep(80.0)

    def turns(self, step: int) -> list[Turn]:
        return [Turn("student", self.loss, 0.5)]

    def loss(self, nets: Nets, teacher: Any, batch: Any) -> Loss:
        a: Any = nets["student"].a
        return Loss(3 * a, {"mine": a}, {"count": torch.ones(2)})

    def after_step(self, step: Step) -> None:
        step.restart("student")


def test_what_the_method_does_is_done() -> None:
    turn = Rewarded(Scored(), Slope(), 0.5).turns(0)[0]
    assert turn.rate == 0.5
    nets = Nets({"student": Line(2.0, 0.5)})
    loss = turn.loss(nets, gaussian(MU, V), batch(40))
    assert loss.total is not None
    assert float(loss.total.detach()) == pytest.approx(3 * 2 - 0.5 * 2)
    assert set(loss.logs) == {"mine", "reward", "reward_std"}
    assert torch.equal(loss.sums["count"], torch.ones(2))
    step = Step(nets, nets["student"], 0, 0, 1, {})
    Rewarded(Scored(), Slope()).after_step(step)
    assert step.restarted == ["student"]


def test_what_the_method_is_it_is_too() -> None:
    inner: Method
    for inner in (SiD(), DMD2(), DMD(pairs=Pairs(8)), FDistill(), ProgressiveDistillation()):
        method = Rewarded(inner, Slope())
        for name in ("needs_data", "frozen", "couples_samples", "length", "output", "sampler"):
            assert getattr(method, name) == getattr(inner, name), name
        assert method.needs_pairs() == inner.needs_pairs()
        assert method.noise_levels(VE()) == inner.noise_levels(VE())
    assert Rewarded(DMD2(), Slope()).needs_data
    assert Rewarded(DMD(), Slope()).needs_pairs() == Pairs()
    assert Rewarded(ProgressiveDistillation(), Slope()).length is not None


def test_it_looks_at_what_would_be_shipped_now() -> None:
    """A stage of eight calls is rewarded after eight, the last of which has the gradient."""
    inner = ProgressiveDistillation(FewStep(2.5, noise="ddim"), start=8)
    nets = inner.init(gaussian(MU, V), Line(0.2, 0.8))
    calls: list[bool] = []
    nets["student"].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    Rewarded(inner, Slope()).turns(0)[0].loss(
        nets, gaussian(MU, V), replaced(batch(2), torch.zeros(4, 1, dtype=F64))
    )
    assert calls[-8:] == [False] * 7 + [True]


def replaced(at: Any, x0: Tensor) -> Any:
    return at._replace(x0=x0)


def test_what_cannot_be_rewarded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distils a teacher, and Pretrain trains one"):
        Rewarded(Pretrain(), Slope())
    with pytest.raises(ValueError, match=r"needs weight > 0 and start >= 0, got 0 and 0"):
        Rewarded(SiD(), Slope(), 0.0)
    with pytest.raises(ValueError, match=r"weight > 0 and start >= 0, got 1 and -1"):
        Rewarded(SiD(), Slope(), 1.0, start=-1)
    still = OptimalSteps(Heun(Karras(0.02, 2.5), 4, 1), 2)
    nets = still.init(gaussian(MU, V), nn.Identity())
    (turn,) = Rewarded(still, Slope()).turns(0)
    with pytest.raises(ValueError, match=r"^OptimalSteps trains no student, which a reward could"):
        turn.loss(nets, gaussian(MU, V), batch(2))


def test_a_reward_of_another_shape_is_refused() -> None:
    @dataclass(frozen=True)
    class Whole(Reward):
        def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
            return pictures

    nets = Nets({"student": Line(0.2, 0.8), "fake": gaussian(0.2, 0.64)})
    turn = Rewarded(DiffInstruct(FewStep(80.0)), Whole()).turns(0)[-1]
    with pytest.raises(ValueError, match=r"^Whole gives one number a picture, \(16,\), got"):
        turn.loss(nets, gaussian(MU, V), batch(4))


def test_it_is_written_with_its_method_alone() -> None:
    """The sampler is the method's, and no setting of its own."""
    text = "Rewarded(SiD(FewStep(steps=2)), Ink(0.5), weight=0.1)"
    method = config.parse(text, Method)
    assert method == Rewarded(SiD(FewStep(steps=2)), Ink(0.5), 0.1)
    assert method.sampler == FewStep(steps=2)
    assert "sampler" not in config.encode(method)
    assert config.decode(config.encode(method)) == method
    assert replace(method, method=SiD(FewStep(steps=3))).sampler.calls == 3
    with pytest.raises(ValueError, match=r"Rewarded has no field 'sampler'"):
        config.parse("Rewarded(SiD(), Ink(), sampler=FewStep())")


@dataclass(frozen=True)
class Kept(Reward):
    """A reward of a file, in name."""

    sha256: str = ""

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def settled(self) -> Kept:
        return Kept("digest")


def test_a_run_records_the_digests_of_all_that_looks() -> None:
    """Of both rewards, and of one within the method within."""
    inner = Rewarded(SiD(), Kept())
    run = replace(digits(), method=Rewarded(inner, Ink(), held_out=Kept()))
    settled = Rewarded(Rewarded(SiD(), Kept("digest")), Ink(), held_out=Kept("digest"))
    assert resolve_run(run, "").method == settled
