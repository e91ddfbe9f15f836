"""The adversarial losses by hand, their averages over parts, and the critic at its optimum."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import NoisedSamples, Rollout
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Nets
from fewstep.losses.adversarial import LOSSES, averaged, cross_entropy, logits, nonsaturating
from fewstep.losses.weight import EDMWeight, Power
from fewstep.methods.sid import SiD
from fewstep.methods.sida import LARGEST, SiDA
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian

F64 = torch.float64
CLASSES = 3
ONE = FewStep(2.5)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_losses_by_hand() -> None:
    """Two samples with two logits each."""
    real = torch.tensor([[0.0, 0.0], [2.0, -1.0]], dtype=F64)
    fake = torch.tensor([[0.0, 0.0], [-3.0, 0.5]], dtype=F64)
    second = (softplus(-2.0) + softplus(-3.0) + softplus(1.0) + softplus(0.5)) / 4
    expected = [math.log(2), second]
    assert cross_entropy(real, fake).tolist() == pytest.approx(expected, rel=1e-14)
    assert cross_entropy(fake, real)[1] > cross_entropy(real, fake)[1]  # the sides matter
    expected = [math.log(2), (softplus(3.0) + softplus(-0.5)) / 2]
    assert nonsaturating(fake).tolist() == pytest.approx(expected, rel=1e-14)
    with pytest.raises(ValueError, match=r"fake has shape \(2, 1\) but real has shape \(2, 2\)"):
        cross_entropy(real, fake[:, :1])


def test_the_other_losses_by_hand() -> None:
    """One sample of two logits; at l = 0 none of them prefers a side."""
    real, fake = torch.tensor([[2.0, -1.0]], dtype=F64), torch.tensor([[-3.0, 0.5]], dtype=F64)
    expected = {
        "hinge": ((0 + 2) + (0 + 1.5)) / 4,
        "least_squares": ((1 + 4) + (4 + 2.25)) / 16,
        "relativistic": (softplus(-5.0) + softplus(1.5)) / 2,
    }
    fooled = {
        "hinge": (3 - 0.5) / 2,
        "least_squares": (16 + 0.25) / 8,
        "relativistic": (softplus(5.0) + softplus(-1.5)) / 2,
    }
    for name, value in expected.items():
        loss = LOSSES[name]
        assert float(loss.discriminator(real, fake)) == pytest.approx(value, rel=1e-14)
        at = fake - real if loss.paired else fake
        assert float(loss.generator(at)) == pytest.approx(fooled[name], rel=1e-14)
        assert loss.discriminator(fake, real) > loss.discriminator(real, fake)
        with pytest.raises(ValueError, match=r"fake has shape \(1, 1\) but real has shape"):
            loss.discriminator(real, fake[:, :1])
    for loss in LOSSES.values():
        at = torch.zeros(1, 1, dtype=F64, requires_grad=True)
        slopes = [
            torch.autograd.grad(loss.discriminator(*sides).sum(), at)[0]
            for sides in ((at, at.detach()), (at.detach(), at))
        ]
        assert torch.equal(slopes[0], -slopes[1])
        assert slopes[0] < 0 > torch.autograd.grad(loss.generator(at).sum(), at)[0]
    with pytest.raises(ValueError, match="least_squares, relativistic, got 'wgan'"):
        Discriminator(loss="wgan")  # type: ignore[arg-type]


def test_a_discriminator_that_knows_everything_loses_nothing() -> None:
    """And no logit, however large, overflows."""
    large = torch.full((1, 3), 1e4, dtype=torch.float32)
    assert cross_entropy(large, -large).item() == 0
    assert cross_entropy(-large, large).item() == 1e4
    assert nonsaturating(-large).item() == 1e4


def test_beyond_ten_the_generator_feels_nothing() -> None:
    """Its slope is -sigmoid(-l) within a bound, and exactly 0 beyond; SiDA's is 10."""
    at = torch.tensor([[-10.5], [-9.5], [0.0], [9.5], [10.5]], dtype=F64, requires_grad=True)
    inner = (-at.detach()).sigmoid().flatten().tolist()
    n: Any = NoisedSamples(at, torch.ones(5), torch.ones(()), torch.ones(()))
    nets: Any = {}
    alone = Discriminator(features="fake", pool="channels")

    def slope(bound: float) -> list[float]:
        fooled = alone.fool(nets, nets, batch(torch.arange(5)), n, None, at, bound=bound)
        assert torch.equal(fooled.total, fooled.gan_loss)
        slopes: list[float] = (5 * torch.autograd.grad(fooled.total, at)[0]).flatten().tolist()
        return slopes

    assert slope(10.0) == pytest.approx([0.0, *(-s for s in inner[1:4]), 0.0])
    assert [bool(s) for s in slope(5.0)] == [False, False, True, False, False]
    assert slope(math.inf) == pytest.approx([-s for s in inner])
    assert LARGEST == 10
    (found,) = torch.autograd.grad(cross_entropy(at, at.detach()).sum(), at)
    assert found.flatten().tolist() == pytest.approx([-s / 2 for s in inner])


def test_logits_are_means_over_channels_or_over_places() -> None:
    features = torch.arange(2 * 3 * 2 * 2, dtype=F64).reshape(2, 3, 2, 2)
    first, second = logits(features).tolist()
    assert first == [4.0, 5.0, 6.0, 7.0]  # places (0, 1, 2, 3) of channels 0, 4, 8
    assert second == [16.0, 17.0, 18.0, 19.0]
    assert logits(features, "space").tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]
    flat = features[:, :, 0, 0]
    assert logits(flat).tolist() == [[4.0], [16.0]]
    assert logits(flat, "space").tolist() == flat.tolist()
    with pytest.raises(ValueError, match="pool is 'channels', 'space' or 'learned', got 'all'"):
        logits(features, "all")  # type: ignore[arg-type]
    assert logits(features[:, :1, 0, 0], "learned").tolist() == [[0.0], [12.0]]  # as they are
    with pytest.raises(ValueError, match=r"leaves one channel, got 3: the fake score has none"):
        logits(features, "learned")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_logits_of_half_precision_are_computed_in_single(dtype: torch.dtype, bits: int) -> None:
    """The mean of 1 and the next number after it, which the precision itself does not have."""
    features = torch.tensor([[[1.0], [1 + 2.0**-bits]]]).to(dtype)
    assert logits(features).item() == 1 + 2.0 ** -(bits + 1)
    assert logits(features.double()).dtype == F64


def test_averages_by_hand() -> None:
    loss, weight = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 0.5, 1.0])[:, None, None]
    assert averaged(loss, weight, "sample").tolist() == [2.0, 1.5, 5.0]
    assert averaged(loss, weight, "batch").tolist() == [6.0, 1.5, 3.0]
    assert averaged(loss, torch.tensor(2.0), "batch").mean() == 6.0
    with pytest.raises(ValueError, match="average is 'batch' or 'sample', got 'mean'"):
        averaged(loss, weight, "mean")  # type: ignore[arg-type]


MODEL = Model(MLP(width=16, blocks=3), (2,), CLASSES)


def network(seed: int, model: Model = MODEL) -> Any:
    """A denoiser whose weights are far from zero everywhere."""
    net = model.build(seed).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=F64, generator=generator)
    return net


def batch(index: Tensor) -> Batch:
    draws = Draws(index, seed=1)
    z, x0 = draws.normal("z", (2,), F64), draws.normal("x0", (2,), F64)
    return Batch(z, draws.integers("label", CLASSES), x0, draws)


def scene() -> tuple[Nets, Any]:
    return Nets({"student": network(1), "fake": network(2)}), network(0)


Average = Literal["batch", "sample"]


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_averages_of_parts(parts: int) -> None:
    """Split, the published loss changes by the covariance of the parts' means; "sample" stays.

    l_i and w_i l_i of a sample are what a batch of that one sample loses.
    """
    nets, teacher = scene()

    def judged(index: Tensor, average: Average, judging: Any = EDMWeight()) -> float:
        turn = Critic(judging=judging, average=average).turn(Rollout(ONE, 1), Unguided())
        return float(turn.loss(nets, teacher, batch(index)).logs["discriminator"].detach())

    whole = torch.arange(12)
    one = torch.tensor([judged(i, "batch", Power()) for i in whole.split(1)], dtype=F64)
    product = torch.tensor([judged(i, "batch") for i in whole.split(1)], dtype=F64)
    w = product / one
    mean_w, mean_l = (v.reshape(parts, -1).mean(1) for v in (w, one))
    split = sum(judged(i, "batch") for i in whole.chunk(parts)) / parts
    covariance = float((mean_w * mean_l).mean() - mean_w.mean() * mean_l.mean())
    assert judged(whole, "batch") == pytest.approx(float(w.mean() * one.mean()), rel=1e-12)
    assert split - judged(whole, "batch") == pytest.approx(covariance, rel=1e-8)
    assert abs(covariance) > 1e-3 * split
    for index in (whole, *whole.chunk(parts)):
        alone = float(product[index].mean())
        assert judged(index, "sample") == pytest.approx(alone, rel=1e-12)


def test_students_average_by_hand() -> None:
    """share gan mean(w') mean(softplus(-l)), or the mean of the products; and its gradient."""
    nets, teacher = scene()
    b, share, gan = batch(torch.arange(12)), 0.3, 0.7
    for average in ("batch", "sample"):
        method = SiDA(ONE, fake=Critic(average=average), share=share, gan=gan)
        found = method.turns(0)[1].loss(nets, teacher, b)
        draws = b.draws
        assert draws is not None
        x = ONE(nets["student"], b.z, b.cond)
        t = method.times.quantile(draws.uniform("t")).to(x)
        xt = x + t[:, None] * draws.normal("eps", (2,)).to(x)
        weight = 1 / (x - teacher(xt, t, b.cond)).abs().mean(1).detach()
        loss = F.softplus(-nets["fake"].encode(xt, t, b.cond).mean(1))
        by_hand = (weight * loss).mean() if average == "sample" else weight.mean() * loss.mean()
        assert found.logs["adversarial"].item() == pytest.approx(by_hand.item(), rel=1e-12)
        assert found.logs["gan_loss"].item() == pytest.approx(loss.mean().item(), rel=1e-12)
        score = SiD(ONE, alpha=1.0).turns(0)[1].loss(nets, teacher, b).total
        total = (1 - share) * score + share * gan * by_hand
        assert found.total.item() == pytest.approx(total.item(), rel=1e-12)
        weights = [*nets["student"].parameters()]
        for g, expected in zip(
            torch.autograd.grad(found.total, weights),
            torch.autograd.grad(total, weights),
            strict=True,
        ):
            torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


def test_critics_loss_by_hand() -> None:
    """Real samples share times, noise and condition; the discriminator is divided by D."""
    nets, teacher = scene()
    b, critic = batch(torch.arange(12)), Critic(scale=5.0, judging=Power(0, -1))
    found = critic.turn(Rollout(ONE, 1), Unguided()).loss(nets, teacher, b)
    assert b.draws is not None
    assert b.x0 is not None
    x, net = ONE(nets["student"], b.z, b.cond), nets["fake"]
    t = critic.times.quantile(b.draws.uniform("t")).to(x)
    noise = t[:, None] * b.draws.normal("eps", (2,)).to(x)
    on_fake, on_real = (net.encode(y + noise, t, b.cond).mean(1) for y in (x, b.x0))
    bce = (F.softplus(on_fake) + F.softplus(-on_real)).mean().detach() / 2
    w = (t**2 + 0.25) / (0.5 * t) ** 2
    told = (w * ((net(x + noise, t, b.cond) - x) ** 2).mean(1)).mean()
    assert found.logs["discriminator"].item() == pytest.approx(float((bce / t).mean()), rel=1e-6)
    assert found.logs["denoising"].item() == pytest.approx(told.item(), rel=1e-6)
    right = ((on_real > 0).double().mean() + (on_fake < 0).double().mean()) / 2
    assert found.logs["discriminator_accuracy"].item() == pytest.approx(right.item(), rel=1e-6)
    assert 0 < right < 1
    total = told + 5.0 / 2 * (bce / t).mean()
    assert found.total.item() == pytest.approx(total.item(), rel=1e-6)


class Judge(nn.Module):
    """A critic of points whose logit is log q_t / p_t + theta . (1, x, x^2)."""

    def __init__(self, real: Gaussian, fake: Gaussian, theta: list[float]) -> None:
        super().__init__()
        self.real, self.told, self.path = real, fake, real.path
        self.theta = nn.Parameter(torch.tensor(theta, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        told: Tensor = self.told(xt, t)
        return told

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        optimal = self.real.log_prob(xt, t) - self.told.log_prob(xt, t)
        return optimal[:, None] + torch.cat([xt**0, xt, xt**2], 1) @ self.theta[:, None]

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self(xt, t), self.encode(xt, t)


class Shift(nn.Module):
    """The student a + b z."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 0.2 + 0.8 * xt / self.path.sigma(t)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "t"), [(VE(), 0.5), (Flow(), 0.4), (VP(), 400.0)])
def test_the_logarithm_of_the_density_ratio_is_stationary(path: NoisePath, t: float) -> None:
    """E of the critic's gradient in theta: zero within 4 standard errors, not if shifted.

    The data are N(1, 0.25), the student's samples N(0.2, 0.64), both noised at one t.
    """
    real = Gaussian(torch.tensor([1.0], dtype=F64), torch.tensor([0.25], dtype=F64), path)
    fake = Gaussian(torch.tensor([0.2], dtype=F64), torch.tensor([0.64], dtype=F64), path)
    critic = Critic(Discrete((t,)), Power(), Power())
    turn = critic.turn(Rollout(FewStep(t), 1), Unguided())

    def deviation(theta: list[float]) -> float:
        judge, found = Judge(real, fake, theta), []
        nets = Nets({"student": Shift(path), "fake": judge})
        for part in range(50):
            draws = Draws.range(part * 2000, 2000, seed=9)
            x0 = 1 + 0.5 * draws.normal("x0", (1,), F64)
            b = Batch(draws.normal("z", (1,), F64), None, x0, draws)
            (g,) = torch.autograd.grad(turn.loss(nets, real, b).total, judge.theta)
            found.append(g)
        each = torch.stack(found)
        return float((each.mean(0).abs() / (each.std(0) / 50**0.5)).max())

    assert deviation([0.0, 0.0, 0.0]) < 4
    for shifted in ([0.2, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.2]):
        assert deviation(shifted) > 8
