"""JDM: the gradient of the joint divergence, and where its levels put the condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, LogNormal
from fewstep.diffusion.types import Batch, Cond
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import Reward, give_decoder
from fewstep.eval.picture_networks import Ink
from fewstep.losses.weight import EDMWeight, Power, Weight
from fewstep.methods.jdm import JDM
from fewstep.nets.mlp import MLP
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.mixture import MIXTURE, energy_distance, pretrained
from tests.quadrature import F64, Even, quantiles

MU, V, TAU = 1.0, 0.25, 0.7
GAIN = V / (V + TAU**2)
SPREAD = (V * (1 - GAIN)) ** 0.5
KL = Power(2, -2)
Vector = tuple[float, float, float]
POSTERIOR: Vector = ((1 - GAIN) * MU, GAIN, SPREAD)
"""E x = w0 + w1 c, and b, of the law of x given c."""


@dataclass(frozen=True)
class Read(Reward):
    """ln N(c; x, tau^2), without its constant."""

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        assert isinstance(cond, Tensor)
        return -((cond - pictures.flatten(1)) ** 2).sum(1) / (2 * TAU**2)


class Linear(nn.Module):
    """The student w0 + w1 c + b z."""

    def __init__(self, values: Vector, path: NoisePath) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=F64))
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        w0, w1, b = self.values
        return w0 + w1 * cond + b * xt / self.path.sigma(t)[:, None]


class Normal(nn.Module):
    """The denoiser of N(w0 + w1 c, b^2) where it is told c, and of N(mu, V) where it is not."""

    def __init__(self, values: Vector, path: NoisePath) -> None:
        super().__init__()
        self.values, self.path = values, path

    def forward(self, xt: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        w0, w1, b = self.values
        mean, v = (MU, V) if cond is None else (w0 + w1 * cond, b**2)
        alpha, sigma = (c(t)[:, None] for c in (self.path.alpha, self.path.sigma))
        return mean + alpha * v / (alpha**2 * v + sigma**2) * (xt - alpha * mean)


def rows(count: int = 4) -> Batch:
    """All triples of z, c ~ N(mu, V + tau^2) and eps, exact for products of two of them."""
    z, c, eps = torch.meshgrid(*(quantiles(count),) * 3, indexing="ij")
    draws = Even(torch.arange(count**3), noise=eps.reshape(-1, 1))
    cond = MU + (V + TAU**2) ** 0.5 * c.reshape(-1, 1)
    return Batch(z.reshape(-1, 1), cond, None, draws)


def gradient(
    values: Vector,
    t: float,
    weight: Weight = KL,
    path: NoisePath = VE(),
    guidance: Guidance | None = None,
) -> Tensor:
    """Of the student's loss in (w0, w1, b), at one level, with an exact fake score."""
    more = {} if guidance is None else {"guidance": guidance}
    method = JDM(FewStep(path.t_max), reward=Read(), times=Discrete((t,)), weight=weight, **more)
    student, teacher = Linear(values, path), Normal(values, path)
    give_decoder(teacher, lambda x: x[:, :, None, None])
    nets = Nets({"student": student, "fake": Normal(values, path)})
    total = method.student_loss(Rollout(method.sampler, 1), nets, teacher, rows()).total
    assert total is not None
    (found,) = torch.autograd.grad(total, [student.values])
    return found


def joint(values: Tensor, alpha: float, sigma: float) -> Tensor:
    """E_c KL(p_t(x | c) || q_t) - E ln p(c | x), in closed form."""
    w0, w1, b = values
    mean, vc = w0 + w1 * MU, V + TAU**2
    p, q = alpha**2 * b**2 + sigma**2, alpha**2 * V + sigma**2
    apart = alpha**2 * ((mean - MU) ** 2 + w1**2 * vc)
    fidelity = (p / q - 1 - (p / q).log() + apart / q) / 2
    miss = (MU - mean) ** 2 + (1 - w1) ** 2 * vc + b**2
    return fidelity + miss / (2 * TAU**2)


@pytest.mark.parametrize("path", [VE(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("tau", [0.01, 0.3, 0.7])
def test_it_is_the_gradient_of_the_joint_divergence(path: NoisePath, tau: float) -> None:
    """At any student, on two paths; tau is a flow time. Control: the teacher is told c."""
    t = float(path.time_of(torch.tensor(tau, dtype=F64)))
    at = torch.tensor(t, dtype=F64)
    alpha, sigma = float(path.alpha(at)), float(path.sigma(at))
    for values in (POSTERIOR, (0.3, 0.8, 0.6), (-0.4, -0.2, 0.9)):
        point = torch.tensor(values, dtype=F64, requires_grad=True)
        (expected,) = torch.autograd.grad(joint(point, alpha, sigma), [point])
        found = gradient(values, t, path=path)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        told = gradient(values, t, path=path, guidance=Unguided())
        assert float((told - expected).norm()) > 0.01


def test_near_the_data_the_posterior_is_the_fixed_point() -> None:
    """To rounding in the limit; at levels t off by their square."""
    point = torch.tensor(POSTERIOR, dtype=F64, requires_grad=True)
    (limit,) = torch.autograd.grad(joint(point, 1.0, 0.0), [point])
    assert float(limit.abs().max()) < 1e-15
    off = [float(gradient(POSTERIOR, t).norm()) for t in (0.02, 0.01)]
    assert off[0] / off[1] == pytest.approx(4, rel=0.01)
    assert off[1] < 3e-3


def test_high_levels_alone_overdo_the_condition() -> None:
    """The golden gains, the posterior's 0.338 and 0.93 at t = 2.5, where the push ends."""
    for t, golden in ((0.01, 0.338), (2.5, 0.93)):
        gain = (V + t * t) / (V + t * t + TAU**2)
        assert gain == pytest.approx(golden, abs=2e-3)
        ends = gradient(((1 - gain) * MU, gain, 0.5), t)
        assert float(ends[:2].abs().max()) < 1e-12
    assert float(gradient(POSTERIOR, 2.5)[1]) < -0.4


def test_the_weight_of_the_datas_variance_has_the_posteriors_gain_at_every_level() -> None:
    """And its spread at low levels alone: at 2.5 nothing holds it. Control: another variance."""
    exact = EDMWeight(V**0.5)
    for t in (0.01, 0.3, 2.5):
        found = gradient(POSTERIOR, t, exact)
        assert float(found[:2].abs().max()) < 1e-11
    assert float(gradient(POSTERIOR, 2.5, EDMWeight(1.0))[1]) < -0.1
    b = SPREAD
    hold = b * (V - b**2) / ((b**2 + 2.5**2) * V)
    assert float(gradient(POSTERIOR, 2.5, exact)[2]) == pytest.approx(b / TAU**2 - hold, rel=1e-9)
    assert abs(float(gradient(POSTERIOR, 0.01, exact)[2])) < 1e-3


def test_strength_is_of_the_condition_and_over_all_dimensions() -> None:
    """In D dimensions ln p(c | x) is divided by D, as the mean over dimensions of the score is."""
    batch, draws = rows(2), torch.ones(8, 3, dtype=F64)
    batch = batch._replace(z=draws, draws=Even(torch.arange(8), noise=draws))
    batch = batch._replace(cond=batch.cond.expand(8, 3))  # type: ignore[union-attr]
    teacher = Normal(POSTERIOR, VE())
    give_decoder(teacher, lambda x: x[:, None, None])
    found = []
    for strength in (1.0, 3.0):
        method = JDM(FewStep(80.0), times=Discrete((0.3,)), strength=strength, reward=Read())
        nets = Nets({"student": Linear(POSTERIOR, VE()), "fake": Normal(POSTERIOR, VE())})
        loss = method.student_loss(Rollout(method.sampler, 1), nets, teacher, batch)
        assert loss.total is not None
        found.append(loss.total.detach())
        condition = loss.logs["condition"].detach()
    torch.testing.assert_close(found[0] - found[1], 2 * condition / 3)
    made = POSTERIOR[0] + POSTERIOR[1] * batch.cond + SPREAD  # type: ignore[operator]
    torch.testing.assert_close(condition, Read()(made, batch.cond).mean())


def test_the_fake_score_hears_what_the_teacher_does_not() -> None:
    """It starts as the teacher where that has the same inputs, else as the student."""
    told, untold = (Model(MLP(8, 1), (2,), classes=c).build(seed=c) for c in (3, 0))
    start = Model(MLP(8, 1), (2,), classes=3).build(seed=9)
    method = JDM(reward=Ink())
    for teacher, like in ((told, told), (untold, start)):
        fake = method.init(teacher, start)["fake"].state_dict()
        assert fake.keys() == like.state_dict().keys()
        assert all(torch.equal(fake[name], value) for name, value in like.state_dict().items())


def test_turns_and_refusals() -> None:
    assert [turn.net for turn in JDM(reward=Ink(), ratio=2).turns(0)] == [
        "fake",
        "fake",
        "student",
    ]
    with pytest.raises(ValueError, match=r"^JDM.strength is positive, got 0$"):
        JDM(reward=Ink(), strength=0.0)
    with pytest.raises(ValueError, match=r"^JDM.ratio is 1 or more, got 0$"):
        JDM(reward=Ink(), ratio=0)


@dataclass(frozen=True)
class Component(Reward):
    """ln p(c | x) of the mixture's component c."""

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        assert isinstance(cond, Tensor)
        x = pictures.flatten(1)
        t = torch.full((len(x),), 1e-3, dtype=x.dtype)
        return MIXTURE.log_prob(x, t, cond) - MIXTURE.log_prob(x, t)


@pytest.mark.slow
def test_components_are_learned_from_a_teacher_without_labels() -> None:
    """Samples of each label are near that component alone, which the start cannot tell."""
    start: Any = Model(MLP(width=64, blocks=2), (2,), classes=3, sigma_data=0.8).build()
    start.load_state_dict({**start.state_dict(), **pretrained().state_dict()})
    teacher: Any = pretrained()
    give_decoder(teacher, lambda x: x[:, None, None])
    method = JDM(weight=EDMWeight(0.8), times=LogNormal(-1.8, 0.7), reward=Component())

    def source(draws: Draws) -> Batch:
        return Batch(draws.normal("z", (2,)), draws.integers("c", 3), None, draws)

    @torch.no_grad()
    def apart(net: Any) -> list[float]:
        draws, found = Draws.range(10**9, 1000, seed=1), []
        for c in range(3):
            label = torch.full((1000,), c)
            x = method.sampler(net, draws.normal("z", (2,)), label, draws)
            exact = MIXTURE.sample(1000, torch.Generator().manual_seed(c), label)
            found.append(energy_distance(x, exact))
        return found

    settings: Any = {"batch": 256, "ema": EMA(4000), "steps": 200}
    settings["optim"] = Optim(3e-3, (0.0, 0.99), decay="cosine")
    *_, last = train(method, teacher, start, source, **settings)
    assert min(apart(start)) > 0.5
    assert max(apart(last.state.average)) < 0.05
