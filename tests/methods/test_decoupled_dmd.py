"""Decoupled DMD: two gradients that sum to guided DMD's, each with levels and noise of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Nets
from fewstep.losses.weight import L1, Power
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.quadrature import F64, Line, batch

A, B, SIGMA = 0.3, 0.7, 0.5


class Conditional(nn.Module):
    """Label 0 is N(1, 1/4); without a label N(-1, 1/4) is as likely. It notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        variance = torch.tensor([[0.25]], dtype=F64)
        self.one = Gaussian(torch.tensor([1.0], dtype=F64), variance, VE())
        means = torch.tensor([[1.0], [-1.0]], dtype=F64)
        half = torch.tensor([0.5, 0.5], dtype=F64)
        self.both = GaussianMixture(means, variance.expand(2, 1, 1), half, VE())
        self.path = VE()
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.calls.append((xt.detach(), t, cond is not None))
        return (self.both if cond is None else self.one)(xt, t)


class Fake(nn.Module):
    """The exact score of the student a + b z."""

    def __init__(self) -> None:
        super().__init__()
        mean = torch.tensor([A], dtype=F64)
        self.score = Gaussian(mean, torch.tensor([[B**2]], dtype=F64), VE())
        self.path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.score(xt, t)


def at_sigma(kappa: float) -> DecoupledDMD:
    exact, law = Power(2, -2), Discrete((SIGMA,))
    return DecoupledDMD(FewStep(2.5), kappa, law, exact, law, exact)


def loss(m: DecoupledDMD, at: Batch, k: int = 1) -> tuple[Loss, Line, Conditional]:
    student, teacher = Line(A, B), Conditional()
    at = at._replace(cond=torch.zeros(len(at.z), dtype=torch.int64))
    nets = Nets({"student": student, "fake": Fake()})
    return m.student_loss(Rollout(m.sampler, k), nets, teacher, at), student, teacher


def gradient(kappa: float, count: int = 250) -> Tensor:
    found, student, _ = loss(at_sigma(kappa), batch(count))
    assert found.total is not None
    return student.gradient(found.total)


def test_matching_is_the_gradient_of_kl_to_the_conditional_law() -> None:
    assert gradient(1.0).tolist() == pytest.approx([-1.4, 0.45405405], abs=2e-3)


def test_augmentation_is_a_reward_for_the_condition() -> None:
    """The golden case at scale 4: -(w - 1) times the gradient of E log q(c | x_t)."""
    found = gradient(4.0) - gradient(1.0)
    assert found.tolist() == pytest.approx([-4.537774, 3.3025698], rel=4e-3)


def test_augmentation_is_linear_in_the_scale_above_one() -> None:
    none, two, three = (gradient(kappa, 30) for kappa in (1.0, 2.0, 3.0))
    torch.testing.assert_close(three - none, 2 * (two - none))


def random_batch(count: int) -> Batch:
    draws = Draws.range(0, count)
    return Batch(draws.normal("z", (1,), F64), None, None, draws)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_augmentation_stays_below_the_time_of_the_call(k: int) -> None:
    m = DecoupledDMD(FewStep(2.5, 4), 3.0, Uniform(0.1, 5.0), L1(), Uniform(0.1, 5.0), L1())
    _, _, teacher = loss(m, random_batch(400), k)
    (_, matched, first), *others = teacher.calls
    own = 2.5 * (1 - (k - 1) / 4)
    assert first
    assert {told for _, _, told in others} == {True, False}
    assert float(matched.max()) > 4.9
    for _, t, _ in others:
        assert float(t.max()) <= own
        assert float(t.max()) > 0.98 * own
        assert 0.1 <= float(t.min()) < 0.1 + 0.02 * own


def test_both_terms_have_noise_and_normalisers_of_their_own() -> None:
    """The gradient in each sample, from the calls that were made, by hand."""
    m = DecoupledDMD(FewStep(2.5, 2), 3.0, Uniform(0.1, 5.0), L1(), Uniform(0.1, 5.0), L1())
    at = random_batch(50)
    found, student, teacher = loss(m, at)
    assert found.total is not None
    (xt, t, _), (other_xt, other_t, _), *_ = teacher.calls
    x = (A + B * at.z).detach()
    noises = torch.cat([(xt - x) / t[:, None], (other_xt - x) / other_t[:, None]], 1)
    assert float(torch.corrcoef(noises.T)[0, 1].abs()) < 0.4
    assert float(torch.corrcoef(torch.stack([t, other_t]))[0, 1].abs()) < 0.4
    with torch.no_grad():
        told, own = teacher.one(xt, t), Fake()(xt, t)
        matching = (own - told) / (x - told).abs()
        told, free = teacher.one(other_xt, other_t), teacher.both(other_xt, other_t)
        augmentation = 2 * (free - told) / (x - told).abs()
    direction = matching + augmentation
    expected = torch.stack([direction.mean(), (direction * at.z).mean()])
    torch.testing.assert_close(student.gradient(found.total), expected)
    assert float(found.logs["matching"]) == pytest.approx(float(matching.abs().mean()))
    assert float(found.logs["augmentation"]) == pytest.approx(float(augmentation.abs().mean()))


def test_without_guidance_the_teacher_is_called_once() -> None:
    found, _, teacher = loss(at_sigma(1.0), random_batch(5))
    assert len(teacher.calls) == 1
    assert float(found.logs["augmentation"]) == 0


def test_the_fake_score_is_updated_more_often() -> None:
    assert [turn.net for turn in DecoupledDMD(ratio=3).turns(0)] == ["fake"] * 3 + ["student"]
    with pytest.raises(ValueError, match=r"DecoupledDMD.ratio is 1 or more, got 0"):
        DecoupledDMD(ratio=0)
