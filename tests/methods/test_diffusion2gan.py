"""Diffusion2GAN: pairs and their map, other conditions and what they do, lazy penalties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Nets
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.distance import SquaredL2
from fewstep.methods.diffusion2gan import Diffusion2GAN
from tests.exact_judges import Glass, Joint
from tests.quadrature import F64, Line, batch

RHO = 0.6
"""The correlation of data x and their condition c, both of variance one."""
REST = (1 - RHO**2) ** 0.5


class Conditional(nn.Module):
    """The student g c + sqrt(1 - rho^2) z, whose law is the data's at g = rho."""

    path = VE()

    def __init__(self, g: float = RHO) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.g * cond + REST * xt / t[:, None]


class ByCondition(nn.Module):
    """The optimal judge of (x, c), a share m of the generated being real under others' c."""

    path = VE()

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m, self.scale = m, nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, *inputs: Any) -> Tensor:
        raise NotImplementedError

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None, beside: Any = None) -> Tensor:
        matched = -((xt - RHO * cond) ** 2) / (2 * REST**2) - math.log(REST)
        if not self.m:
            return 0 * self.scale * xt
        alone = -(xt**2) / 2
        generated = torch.logaddexp(math.log(1 - self.m) + matched, math.log(self.m) + alone)
        return self.scale * (matched - generated)

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def conditional(m: float) -> tuple[Diffusion2GAN, Nets, Batch]:
    """Pairs (z, c, x) of the data's law, on a grid; the batch's own conditions are others'."""
    judge = Discriminator(None, "own", mismatch=m)
    at = batch(400)
    assert at.draws is not None
    z, c = at.z, at.draws.normal("c", (1,), F64)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    more = {"pair_z": z, "pair_x0": RHO * c + REST * z, "pair_cond": c}
    given = at._replace(cond=c[order], more=more)
    nets = Nets({"student": Conditional(), "discriminator": ByCondition(m)})
    return Diffusion2GAN(distance=SquaredL2(), judge=judge, gan=1.0), nets, given


@pytest.mark.parametrize(("m", "golden"), [(0.0, 0.0), (0.25, -0.0823), (0.5, -0.1487)])
def test_other_conditions_move_the_minimum(m: float, golden: float) -> None:
    """d/dg of the adversarial loss at the data's own law, from an independent script."""
    method, nets, given = conditional(m)
    total = method.student_loss(nets, Glass(), given).total  # type: ignore[arg-type]
    student: Any = nets["student"]
    assert total is not None
    (slope,) = torch.autograd.grad(total, student.g)  # squared errors are zero and at rest here
    assert float(slope) == pytest.approx(golden, abs=2e-3)


@pytest.mark.parametrize("m", [0.25, 0.5])
def test_the_judge_of_conditions_rests(m: float) -> None:
    """At its optimum, for the share that it is of; not for another, nor with c in c' place."""
    for share, shuffled, still in ((m, True, True), (0.75, True, False), (m, False, False)):
        method, nets, given = conditional(share)
        judge: Any = nets["discriminator"]
        judge.m = m
        if not shuffled:
            given = given._replace(cond=given.more["pair_cond"])
        turn = method.turns(1)[0]
        total = turn.loss(nets, Glass(), given).total  # type: ignore[arg-type]
        assert total is not None
        slope = abs(float(torch.autograd.grad(total, judge.scale)[0]))
        assert slope < 1e-3 if still else slope > 5e-3


def linear(c: float, paired: bool) -> tuple[float, float]:
    """The regression, and d/db of the adversarial loss of b z, of pairs y = 0.6 z.

    By an optimal judge of samples with a noise of variance 0.3, given z or not.
    """
    k, w, at = 0.6, 0.3, batch(300)
    judge = Discriminator(Discrete((w**0.5,)), "own", joint=True)
    m = Diffusion2GAN(FewStep(2.0), distance=SquaredL2(), judge=judge, gan=1.0)

    def logit(y: Tensor, xt: Tensor | None) -> Tensor:
        assert xt is not None
        if paired:
            return ((y - c * xt / 2) ** 2 - (y - k * xt / 2) ** 2) / (2 * w)
        u, v = c**2 + w, k**2 + w
        return y**2 / (2 * u) - y**2 / (2 * v) + math.log(u / v) / 2

    student = Line(0.0, c)
    nets = Nets({"student": student, "discriminator": Joint(logit)})
    given = at._replace(more={"pair_z": at.z, "pair_x0": k * at.z})
    loss = m.student_loss(nets, Glass(), given)  # type: ignore[arg-type]
    assert loss.total is not None
    apart = loss.logs["regression"]
    slope = student.gradient(loss.total - apart)[1]
    return float(apart.detach()), float(slope)


def test_zero_at_the_teachers_map_alone() -> None:
    """The mirrored student has the same law: a judge that is not told z does not mind it."""
    apart, slope = linear(0.6, True)
    assert apart < 1e-12
    assert abs(slope) < 1e-12
    apart, slope = linear(-0.6, True)
    assert apart == pytest.approx(1.44, rel=1e-6)
    assert slope < -1.0
    assert abs(linear(-0.6, False)[1]) < 1e-12


def test_the_judge_hears_the_noise_of_the_pair_on_both_sides() -> None:
    """And other noise with another's condition. The student is given the pair's."""
    heard: list[tuple[Tensor, Tensor]] = []

    class Listening(Joint):
        def encode(self, xt: Tensor, t: Tensor, cond: Any = None, beside: Any = None) -> Tensor:
            heard.append((cond, beside[0]))
            return self.scale * xt

    judge = Discriminator(None, "own", joint=True, mismatch=0.5)
    draws = Draws.range(0, 7)
    z, other, y = (draws.normal(name, (1,), F64) for name in ("z", "other", "y"))
    here, there = torch.zeros(7), torch.ones(7)
    more = {"pair_z": z, "pair_x0": y, "pair_cond": there}
    nets = Nets({"student": Line(0.0, 1.0), "discriminator": Listening(lambda *_: z)})
    m = Diffusion2GAN(FewStep(2.0), distance=SquaredL2(), judge=judge)
    for turn in m.turns(1):
        turn.loss(nets, Glass(), Batch(other, here, None, draws, more))
    expected = [(there, 2 * z)] * 2 + [(here, 2 * other), (there, 2 * z)]
    assert len(heard) == 4
    for (cond, state), (told, noise) in zip(heard, expected, strict=True):
        assert cond is told
        torch.testing.assert_close(state, noise)


def test_the_judge_tells_the_teachers_sample_from_the_students() -> None:
    """By hand: a logit s x, teacher's samples 1, the student's 2 z of the pair's noise z = -1.

    The mean of log(1 + e^(-s)) and log(1 + e^(-2 s)) has the slope of half
    -1/(1 + e) - 2/(1 + e^2) at s = 1.
    """

    class Value(Joint):
        def encode(self, xt: Tensor, t: Tensor, cond: Any = None, beside: Any = None) -> Tensor:
            return self.scale * xt

    ones = torch.ones(4, 1, dtype=F64)
    more = {"pair_z": -ones, "pair_x0": ones, "pair_cond": torch.zeros(4)}
    given = Batch(3 * ones, torch.zeros(4), None, Draws.range(0, 4), more)
    judge: Any = Value(lambda *_: ones)
    nets = Nets({"student": Line(0.0, 2.0), "discriminator": judge})
    m = Diffusion2GAN(FewStep(2.0), distance=SquaredL2(), judge=Discriminator(None, "own"))
    total = m.turns(1)[0].loss(nets, Glass(), given).total  # type: ignore[arg-type]
    assert total is not None
    (slope,) = torch.autograd.grad(total, judge.scale)
    expected = -1 / (1 + math.e) - 2 / (1 + math.e**2)
    assert float(slope) == pytest.approx(expected / 2, abs=1e-9)


def test_penalties_are_lazy() -> None:
    """None but in every third update, three times as large there."""
    judge = Discriminator(None, "own", penalty=GradientPenalty(0.5, 0.25, 0.1))
    m = Diffusion2GAN(judge=judge, every=3)
    found = [m.turns(step)[0].loss.args[0].penalty for step in range(4)]  # type: ignore[attr-defined]
    often, never = GradientPenalty(1.5, 0.75, 0.1), GradientPenalty(0.0, 0.0, 0.1)
    assert found == [often, never, never, often]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Diffusion2GAN.sampler is a FewStep of one call, as"):
        Diffusion2GAN(FewStep(2.5, 2))
    with pytest.raises(ValueError, match=r"has no fake score to judge by, and needs gan >= 0"):
        Diffusion2GAN(judge=Discriminator(features="fake", pool="channels"))
    with pytest.raises(ValueError, match=r"every >= 1; got 'own', 0.1 and 0"):
        Diffusion2GAN(every=0)
    assert Diffusion2GAN().noise_levels(VE()) is None
