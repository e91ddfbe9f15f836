"""SCott on a Gaussian: the fixed point is a product of steps that shrink with eta."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import Ladder, stochastic_step
from fewstep.distillation.method import Nets
from fewstep.methods.scott import SCott
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from tests.instances import PATHS, TEACHERS
from tests.methods.test_battery import stirred
from tests.quadrature import F64

LAM = 0.25
STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(), 2.5),
    "flow": (Flow(), 1.0),
    "trig": (TrigFlow(), 1.5),
    "vp": (VP(), 999.0),
}
each_path = pytest.mark.parametrize("name", STARTS)


def gaussian(path: NoisePath) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[LAM]], dtype=F64), path)


def method(name: str, steps: int = 6, **settings: Any) -> SCott:
    plain: dict[str, Any] = {"gan": 0.0, "decay": 0.0, "substeps": 1}
    return SCott(FewStep(STARTS[name][1]), Ladder(steps), **(plain | settings))


def mean_step(path: NoisePath, t: float, s: float, eta: float) -> float:
    """E[x_s given x_t] / x_t of one stochastic step, by hand."""
    (a, b), (sa, sb) = (
        [float(f(torch.tensor(u, dtype=F64))) for u in (t, s)] for f in (path.alpha, path.sigma)
    )
    f = a * LAM / (a * a * LAM + sa * sa)
    fresh = eta * sb / sa * (sa**2 - (a / b * sb) ** 2) ** 0.5
    return b * f + (sb**2 - fresh**2) ** 0.5 * (1 - a * f) / sa


class Ends(nn.Module):
    """X = a_i x_t at each time of a ladder, with free numbers a_i."""

    def __init__(self, path: NoisePath, times: list[float], gains: list[float]) -> None:
        super().__init__()
        self.path, self.times = path, torch.tensor(times, dtype=F64)
        self.gains = nn.Parameter(torch.tensor(gains, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        at = (self.times - t[:, None]).abs().argmin(1)
        s = self.times[:1]
        a = self.path.sigma(s) / self.path.sigma(t)
        b = torch.where(at > 0, self.path.alpha(s) - a * self.path.alpha(t), 1.0)
        return torch.where(at > 0, (self.gains[at] - a) / b, 7.0)[:, None] * xt


@dataclass(frozen=True, eq=False)
class Mirrored(Draws):
    """Noise of the steps that comes with both signs: its mean over the batch is zero, exactly."""

    def normal(self, purpose: str, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        half = replace(self, index=self.index // 2)
        found = Draws.normal(half, purpose, shape, dtype)
        sign = 1 - 2 * (self.index % 2).to(dtype)
        return found * (sign[:, None] if purpose.startswith("step") else 1)

    def integers(self, purpose: str, high: int) -> Tensor:
        return Draws.integers(replace(self, index=self.index // 2), purpose, high)


def scene(name: str, count: int = 600) -> tuple[Any, Batch]:
    draws = Mirrored(torch.arange(count))
    x0 = 0.5 * draws.normal("x0", (1,), F64)
    return gaussian(STARTS[name][0]), Batch(x0, None, x0, draws)


def products(m: SCott, path: NoisePath, start: float) -> list[float]:
    gains = [1.0]
    for s, t in pairwise(m.ladder.times(path, start)):
        gains.append(gains[-1] * mean_step(path, t, s, m.eta))
    return gains


@each_path
@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_the_mean_gradient_is_zero_at_the_product_of_mean_steps(name: str, eta: float) -> None:
    """The loss only for eta = 0; the product of another eta is not a fixed point."""
    path, start = STARTS[name]
    m = method(name, eta=eta)
    teacher, batch = scene(name)
    student = Ends(path, m.ladder.times(path, start), products(m, path, start))

    def gradient() -> tuple[float, float]:
        total = m.student_loss(Nets({"student": student}), teacher, batch).total
        assert total is not None
        (found,) = torch.autograd.grad(total, student.gains)
        return float(total.detach()), float(found.abs().max())

    loss, slope = gradient()
    assert slope < 1e-12
    assert (loss < 1e-20) == (eta == 0)
    other = products(replace(m, eta=0.3), path, start)
    student.gains.data.copy_(torch.tensor(other, dtype=F64))
    assert gradient()[1] > 1e-5


@pytest.mark.parametrize(
    ("eta", "deviation"), [(0.0, 0.46485821), (0.1, 0.44591739), (0.3, 0.31814891)]
)
def test_golden_deviations_from_sigma_80(eta: float, deviation: float) -> None:
    """Of one-step samples on N(0, 1/4), EDM's ladder of 40 levels: less the larger eta is."""
    m = SCott(FewStep(80.0), Ladder(39), eta, gan=0.0)
    assert 80 * products(m, VE(), 80.0)[-1] == pytest.approx(deviation, rel=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_stochastic_step_is_between_ddim_and_ancestral(path: NoisePath) -> None:
    """Of noised data by a perfect prediction: the law at s for every eta."""
    draws = Draws.range(0, 3)
    x0, xt, eps = (draws.normal(name, (2,), F64) for name in ("x0", "xt", "eps"))
    low, high = max(path.t_min, 0.2 * path.t_max), 0.7 * path.t_max
    t, s = (torch.full((3,), u, dtype=F64) for u in (high, low))
    made = [stochastic_step(path, xt, x0, eps, t, s, eta) for eta in (0.0, 1.0)]
    torch.testing.assert_close(made[0], path.ddim(xt, x0, t, s))
    torch.testing.assert_close(made[1], path.ancestral(xt, x0, eps, t, s))
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    for eta in (0.0, 0.2, 0.3, 1.0):
        kept = stochastic_step(path, path.sigma(t)[:, None] * one, zero, zero, t, s, eta)
        fresh = stochastic_step(path, zero, zero, one, t, s, eta)
        torch.testing.assert_close(kept**2 + fresh**2, path.sigma(s)[:, None] ** 2 * one)


def test_substeps_by_hand() -> None:
    """Three steps of a mixture's teacher, even in flow time, each with noise of its own."""
    path = Flow()
    teacher: Any = TEACHERS["mixture"](path)
    draws = Draws.range(0, 30)
    x0 = teacher.sample(30, torch.Generator().manual_seed(0)).double()
    batch = Batch(x0, None, x0, draws)
    m = SCott(FewStep(1.0), Ladder(4), 0.3)
    at = m.pair(path, batch)
    x, t = at.xt, at.t
    for k in (1, 2, 3):
        s = at.t + (at.u - at.t) * k / 3
        f = teacher(x, t)
        left = (1 - t) * s / (1 - s)
        tau = (0.3 * s / t * (t**2 - left**2).sqrt())[:, None]
        noise = (x - (1 - t[:, None]) * f) / t[:, None]
        fresh = draws.normal(f"step{k}", (2,)).double()
        x = (1 - s[:, None]) * f + (s[:, None] ** 2 - tau**2).sqrt() * noise + tau * fresh
        t = s
    torch.testing.assert_close(m.lower(teacher, at, batch), x)
    plain = replace(m, eta=0.0).lower(teacher, at, batch)
    assert float((plain - x).abs().mean()) > 1e-2


def test_more_substeps_without_noise_come_to_the_flow() -> None:
    """At eta = 0 the error of h DDIM steps halves with twice as many."""
    teacher, batch = scene("flow", 100)
    at = method("flow", 3).pair(Flow(), batch)
    k = ((1 - at.u) ** 2 * LAM + at.u**2).sqrt() / ((1 - at.t) ** 2 * LAM + at.t**2).sqrt()
    errors = [
        float(
            (method("flow", 3, eta=0.0, substeps=h).lower(teacher, at, batch) / at.xt - k[:, None])
            .abs()
            .max()
        )
        for h in (8, 16)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


def test_the_discriminator_judges_predictions_at_noised_data() -> None:
    model = Model(MLP(16, 1), (2,), path=Flow(), predicts="velocity")
    net: Any = stirred(model.build(1), 1)
    m = SCott(FewStep(1.0), Ladder(4))
    nets = m.init(net, net)
    stirred(nets["discriminator"], 2)
    assert [turn.net for turn in m.turns(0)] == ["discriminator", "student"]
    draws = Draws.range(0, 12)
    x0 = draws.normal("x", (2,))
    batch = Batch(x0, None, x0, draws)
    at = m.pair(Flow(), batch)
    t = torch.full((12,), 1e-3)
    student: Any = nets["student"]
    on_fake, on_real = (
        m.discriminator.logits(nets, net, x, t, None) for x in (student(at.xt, at.t), x0)
    )
    judged = m.student_loss(nets, net, batch)
    plain = replace(m, gan=0.0).student_loss(nets, net, batch)
    assert judged.total is not None
    assert plain.total is not None
    torch.testing.assert_close(judged.logs["gan_loss"], -on_fake.mean())
    torch.testing.assert_close(judged.total - plain.total, -0.4 / 2 * on_fake.mean())
    hinge = ((1 - on_real).relu() + (1 + on_fake).relu()).mean() / 2
    torch.testing.assert_close(m.discriminator_loss(nets, net, batch).total, hinge)
    assert set(replace(m, gan=0.0).init(net, net)) == {"student", "target"}


def test_guidance_is_the_teachers() -> None:
    net: Any = stirred(Model(MLP(16, 1), (2,), 3, Flow(), "velocity").build(2), 2).double()
    draws = Draws.range(0, 30)
    x0 = draws.normal("x", (2,), F64)
    batch = Batch(x0, draws.integers("label", 3), x0, draws)
    m = method("flow", eta=0.0, kappa=2.5)
    at = m.pair(Flow(), batch)
    free, told = net(at.xt, at.t, None), net(at.xt, at.t, batch.cond)
    by_hand = Flow().ddim(at.xt, free + 2.5 * (told - free), at.t, at.u)
    torch.testing.assert_close(m.lower(net, at, batch), by_hand)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.6}, "the blurred mean of its targets; got 0.6"),
        ({"eta": -0.1}, "between 0 and 0.3"),
        ({"substeps": 0}, "substeps >= 1"),
        ({"gan": -1.0}, "gan >= 0"),
        ({"decay": 1.0}, "below 1; got 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCott(**settings)
