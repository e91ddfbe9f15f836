"""Distances and weights by hand, and whole methods against the closed forms of their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Method, Nets
from fewstep.losses.distance import (
    Distance,
    Exponential,
    NormPower,
    PseudoHuber,
    SquaredL2,
    SumOfAbsolutes,
    SumOfPowers,
    huber,
    regression,
    rms_distance,
)
from fewstep.losses.score import denoising, kl, sid, sim
from fewstep.losses.weight import (
    L1,
    SNR,
    EDMWeight,
    MinSNR,
    Power,
    SignalNoise,
    TruncatedSNR,
    Weight,
)
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from tests import gaussians as closed
from tests.gaussians import F64, Setting, rows
from tests.instances import DISTANCES, WEIGHTS

Y = torch.tensor([[3.0, -4.0], [1.0, 2.0]], dtype=F64)
VALUES: dict[Distance, list[float]] = {
    SquaredL2(): [25.0, 5.0],
    PseudoHuber(0.5): [25.25**0.5 - 0.5, 5.25**0.5 - 0.5],
    NormPower(3.0): [125.0, 5**1.5],
    NormPower(4.0): [625.0, 25.0],
    SumOfPowers(4.0): [337.0, 17.0],
    Exponential(0.05): [math.expm1(1.25), math.expm1(0.25)],
}


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_distance_value(distance: Distance) -> None:
    assert distance.value(Y).tolist() == pytest.approx(VALUES[distance], rel=1e-14)
    picture = Y.reshape(1, 1, 2, 2)
    assert distance.value(picture).tolist() == distance.value(Y.reshape(1, 4)).tolist()


@pytest.mark.parametrize("distance", [*DISTANCES, NormPower(2.5), SumOfPowers(2.5)], ids=repr)
def test_slope_is_the_derivative_of_the_value_and_differentiable_at_zero(
    distance: Distance,
) -> None:
    y = Y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(distance.value(y).sum(), y)
    torch.testing.assert_close(distance.slope(Y), slope, rtol=1e-13, atol=1e-13)
    at_zero = torch.zeros(3, 2, dtype=F64, requires_grad=True)
    (curvature,) = torch.autograd.grad(distance.slope(at_zero).sum(), at_zero)
    expected = {SquaredL2(): 2.0, PseudoHuber(0.5): 2.0, Exponential(0.05): 0.1}.get(distance, 0.0)
    assert distance.slope(at_zero).abs().max() == 0
    torch.testing.assert_close(curvature, torch.full_like(curvature, expected))


@pytest.mark.parametrize("distance", [NormPower, SumOfPowers])
def test_powers_below_two_are_refused(distance: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 2, got 1\.5"):
        distance(1.5)
    with pytest.raises(ValueError, match="c must be positive"):
        PseudoHuber(0.0)


def test_regressions_are_means_over_a_samples_own_dimensions() -> None:
    """Of 3, -4 and of 1, 2: (9 + 16) / 2 and 5 / 2; 7 / 2 and 3 / 2."""
    zero = torch.zeros_like(Y)
    assert regression(SquaredL2(), Y, zero).tolist() == [12.5, 2.5]
    assert regression(SumOfAbsolutes(), Y, zero).tolist() == [3.5, 1.5]
    assert SumOfAbsolutes().slope(Y).tolist() == [[1.0, -1.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match=r"x0 has shape \(2, 1\) but prediction has"):
        regression(SquaredL2(), Y, zero[:, :1])


def test_losses_are_means_over_a_samples_own_dimensions() -> None:
    """Three hand-made numbers: x = (1, 2), real = (2, 0), fake = (0, 1)."""
    x, real, fake = rows([1.0, 2.0]), rows([2.0, 0.0]), rows([0.0, 1.0])
    # delta = (2, -1), fake - x = (-1, -1): <delta, fake - x> = -1, |delta|^2 = 5
    assert sid(x, real, fake, 0.5).item() == (-1 + 2.5) / 2
    assert sid(x, real, fake, 1.2, 3.0).item() == pytest.approx(3 * (-1 - 1.0) / 2)
    # y = -2 delta: -w k d'(y) . (fake - x) = -3 . 2 . 2 . (-2) . (-1)
    assert sim(x, real, fake, SquaredL2(), 2.0, 3.0).item() == -12.0
    assert kl(x, real, fake, 4.0).item() == 4 * (-2 * 1 + 1 * 2) / 2
    assert denoising(real, x, 2.0).item() == 2 * (1 + 4) / 2
    with pytest.raises(ValueError, match=r"fake has shape \(1, 1\) but x has shape \(1, 2\)"):
        sid(x, real, fake[:, :1], 1.0)


WEIGHED = {
    Power(): [1.0, 1.0],
    Power(2, -2): [0.25 / 4, 4 / 0.25],
    Power(1, -4, 3.0): [3 * 0.5 / 16, 3 * 2 / 0.0625],
    EDMWeight(): [(0.0625 + 4) / 1, (1 + 0.25) / 0.0625],
    SNR(): [4 + 0.25 / 4, 4 + 4 / 0.25],
    TruncatedSNR(): [1.0, 16.0],
    MinSNR(): [0.25 / 4, 5.0],
    SignalNoise(): [1 / 4.25, 1 / 4.25],
    L1(): [1 / 1.5, 1e5],
}


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_weight_by_hand_and_detached(weight: Weight) -> None:
    """alpha = (0.5, 2), sigma = (2, 0.5); |x - real| has means 1.5 and 0."""
    alpha, sigma = rows([0.5], [2.0]).requires_grad_(), rows([2.0], [0.5]).requires_grad_()
    x = rows([1.0, 2.0], [3.0, 3.0]).requires_grad_()
    real = rows([2.0, 0.0], [3.0, 3.0]).requires_grad_()
    found = weight(x, real, alpha, sigma)
    assert not found.requires_grad
    assert found.expand(2, 1).flatten().tolist() == pytest.approx(WEIGHED[weight], rel=1e-14)


def test_l1_is_computed_in_single_precision() -> None:
    """Means over 50,000 numbers of 0.1: exact to 1e-6 although the tensors are half."""
    x, one = torch.full((1, 50_000), 0.125, dtype=torch.float16), torch.ones(1, 1)
    weight = L1()(x, torch.zeros_like(x), one, one)
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(8.0, rel=1e-6)


class Affine(nn.Module):
    """The student a + B z, z = x_t / sigma_t being what `FewStep` starts from."""

    def __init__(self, s: Setting, path: NoisePath) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(s.a.clone()), nn.Parameter(s.b.clone())
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.a + xt / self.path.sigma(t)[:, None] @ self.b.T


PLAIN = FewStep(1.0)
EXPECTED: Mapping[str, tuple[Method, Any]] = {
    "SiD": (
        SiD(PLAIN, 0.5, weight=Power(2, -4)),
        lambda s: 0.5 * closed.gradient(closed.fisher, s),
    ),
    "SIM": (
        SIM(PLAIN, PseudoHuber(0.5), scale=Power(1, -2)),
        lambda s: closed.sim_gradient(s, PseudoHuber(0.5)),
    ),
    "SIM, weighted": (
        SIM(PLAIN, SquaredL2(), scale=Power(1, -2), weight=Power(0, 0, 3.0)),
        lambda s: 3 * closed.sim_gradient(s, SquaredL2()),
    ),
    "DiffInstruct": (
        DiffInstruct(PLAIN, weight=Power(2, -2)),
        lambda s: closed.gradient(closed.kl_divergence, s),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=repr)
def test_student_gradient_of_whole_methods(name: str, path: NoisePath) -> None:
    """With an exact fake score, at one noise level: the divergence's gradient.

    2e5 samples: errors of a component are about 0.5 % of the norm; the bound is 2 %.
    """
    t = {"VE": 0.8, "Flow": 0.4, "VP": 400.0}[type(path).__name__]
    s = closed.example(t, path)
    method, expected = EXPECTED[name]
    method = replace(method, sampler=FewStep(t), times=Discrete((t,)))  # type: ignore[call-arg]
    nets = Nets({"student": Affine(s, path), "fake": s.fake()})
    draws = Draws.range(0, 200_000, seed=3)
    turn = {turn.net: turn for turn in method.turns(0)}["student"]
    loss = turn.loss(nets, s.real(), Batch(draws.normal("z", (3,), F64), draws=draws))
    (3 * loss.total).backward()
    student: Any = nets["student"]
    found = torch.cat([student.a.grad, student.b.grad.flatten()])
    reference = expected(s)
    assert (found - reference).norm() <= 2e-2 * reference.norm()


def test_fake_score_loss_at_its_optimum() -> None:
    """Its value there is w tr(C - C N^-1 C) / D, the posterior's variance; errors of 0.3 %."""
    s = closed.example(0.8)
    nets = Nets({"student": Affine(s, VE()), "fake": s.fake()})
    draws = Draws.range(0, 200_000, seed=3)
    batch = Batch(draws.normal("z", (3,), F64), draws=draws)
    c = s.b @ s.b.T
    posterior = torch.trace(c - c @ torch.linalg.solve(c + s.sigma**2 * s.eye(), c)) / 3
    fake = FakeScore(Discrete((s.t,)), Power(0, -2, 5.0))
    loss = fake.turn(PLAIN).loss(nets, s.real(), batch)
    assert not loss.total.requires_grad  # the samples carry no gradient to the student
    expected = 5 / s.sigma**2 * float(posterior)
    assert loss.total.item() == pytest.approx(expected, rel=1e-2)
    # the same denoiser in pretraining, with the student's samples as data, EDM's weight at sd 0.5
    data = batch._replace(x0=s.a + batch.z @ s.b.T)
    loss = (
        Pretrain(times=Discrete((s.t,)))
        .turns(0)[0]
        .loss(Nets({"denoiser": s.fake()}), s.real(), data)
    )
    expected = (0.25 + s.sigma**2) / (0.5 * s.sigma) ** 2 * float(posterior)
    assert loss.total.item() == pytest.approx(expected, rel=1e-2)


def test_distances_of_root_mean_squares() -> None:
    """Of the same size for samples of any size; the mean of Huber's is over elements."""
    y = torch.tensor([[3.0, -4.0], [0.3, 0.4]], dtype=torch.float64)
    wide = y.repeat(1, 8).reshape(2, 4, 4)
    for distance in (SquaredL2(), PseudoHuber(0.1), NormPower(3.0)):
        torch.testing.assert_close(rms_distance(distance, wide), rms_distance(distance, y))
    torch.testing.assert_close(rms_distance(SquaredL2(), y), (y**2).mean(1))
    by_hand = ((9.01**0.5 - 0.1) + (16.01**0.5 - 0.1)) / 2
    assert huber(y, 0.1)[0].item() == pytest.approx(by_hand)
    assert huber(wide, 0.1)[0].item() == pytest.approx(by_hand)
