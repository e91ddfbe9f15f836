"""Self-E: what the network thinks of its samples is guided KL's direction, and data hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath, coefficients
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.flow_maps import level
from fewstep.distillation.method import Loss, Nets, Step
from fewstep.losses.weight import Power
from fewstep.methods.self_e import Jump, SelfE
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.networks import stirred
from tests.quadrature import F64, quantiles

A, B, T, S, W = 0.3, 0.7, 2.0, 0.5, 4.0
PATHS = (VE(), Flow())


@dataclass(frozen=True, eq=False)
class Given(Draws):
    """Normal draws as they are given, by purpose; uniform ones in the middle, "diagonal" at 1."""

    normals: Mapping[str, Tensor] = field(default_factory=dict)

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.normals[self.prefix + purpose].reshape(-1, *shape)

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        value = 1.0 if purpose == "diagonal" else 0.5
        return torch.full((len(self.index),), value, dtype=F64)


def batch(x0: Tensor, eps: Tensor, own: Tensor, labels: bool = False) -> Batch:
    """Data (B, 1), the noise of x_t, and that of the student's output."""
    draws = Given(torch.arange(len(x0)), normals={"eps": eps, "self/eps": own})
    cond = torch.zeros(len(x0), dtype=torch.int64) if labels else None
    return Batch(x0, cond, x0, draws)


def normal(mean: float, variance: float, path: NoisePath) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), path)


class Whole(nn.Module):
    """One network: jumps to s < t give a + b n, n the standard normal that x_t is made of.

    At s = t it is the denoiser of N(1, 1/4) for label 0, of its even mixture with N(-1, 1/4)
    without one, and of its own samples where it is told so.
    """

    def __init__(self, path: NoisePath = VE()) -> None:
        super().__init__()
        self.path = path
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (A, B))
        self.one = normal(1.0, 0.25, path)
        means = torch.tensor([[1.0], [-1.0]], dtype=F64)
        half = torch.tensor([0.5, 0.5], dtype=F64)
        spread = torch.full((2, 1, 1), 0.25, dtype=F64)
        self.both = GaussianMixture(means, spread, half, path)
        self.own = normal(A, B**2, path)

    def forward(
        self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Any = None, fake: Any = None
    ) -> Tensor:
        if fake is not None:
            assert bool((fake == 1).all())
            return self.own(xt, t) + 0 * self.a
        if cond is None:
            return self.both(xt, t)
        if bool((s == t).all()):
            return self.one(xt, t)
        alpha, sigma = coefficients(self.path, xt, t)
        return self.a + self.b * (xt - alpha) / (0.25 * alpha**2 + sigma**2).sqrt()


def at_level(path: NoisePath, **changes: Any) -> tuple[SelfE, Jump, Batch]:
    """All pairs of quantiles of n and of the noise at s: the expectation over both."""
    points = quantiles(300)
    n, own = (grid.reshape(-1, 1) for grid in torch.meshgrid(points, points, indexing="ij"))
    t, s = (path.time_of(torch.tensor(v / (1 + v), dtype=F64)).expand(len(n)) for v in (T, S))
    alpha, sigma = coefficients(path, n, t)
    xt = alpha + (0.25 * alpha**2 + sigma**2).sqrt() * n
    return SelfE(**changes), Jump(xt, t, s, torch.ones_like(t)), batch(n, n, own, labels=True)


def parts(path: NoisePath, late: bool = True, **changes: Any) -> tuple[Tensor, Tensor]:
    """The gradients (d/da, d/db) of <alpha^2 / sigma^2 Delta, x>, for both parts of Delta."""
    net = Whole(path)
    m, at, b = at_level(path, decay=0.0, **changes)
    x = net(at.xt, at.t, b.cond, s=at.s)
    opinion = m.opinion(Nets({"student": net}), x.detach(), at, late, b)
    alpha, sigma = coefficients(path, x, at.s)
    scale = alpha**2 / sigma**2
    return tuple(  # type: ignore[return-value]
        torch.stack(
            torch.autograd.grad((scale * part * x).mean(), [net.a, net.b], retain_graph=True)
        )
        for part in (opinion.classifier, opinion.auxiliary)
    )


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_parts_are_those_of_guided_kl(path: NoisePath) -> None:
    """Golden gradients of DMD's two terms at scale 4 and noise level 1/2, each over the scale.

    The auxiliary part is the gradient of KL(p_s || q_s); the classifier's that of
    -(w - 1) E log q(c | x_s). Levels are sigma / alpha, so both paths have the same numbers.
    """
    classifier, auxiliary = parts(path, kappa=W)
    assert (W * auxiliary).tolist() == pytest.approx([-1.4, 0.45405405], abs=2e-3)
    assert (W * classifier).tolist() == pytest.approx([-4.537774, 3.3025698], abs=1e-2)


def test_early_it_is_the_classifier_alone() -> None:
    classifier, auxiliary = parts(VE(), late=False, kappa=W)
    assert auxiliary.tolist() == [0, 0]
    expected = torch.tensor([-4.537774, 3.3025698]) / (W - 1)
    assert classifier.tolist() == pytest.approx(expected.tolist(), abs=3e-3)


def test_without_guidance_it_is_the_auxiliary_term_alone() -> None:
    classifier, auxiliary = parts(VE(), kappa=1.0)
    assert classifier.tolist() == [0, 0]
    assert auxiliary.tolist() == pytest.approx([-1.4, 0.45405405], abs=2e-3)


class Linear(nn.Module):
    """Data N(0, 1/2): its denoiser at s = t, and the student b x_t, which knows its own law."""

    VAR = 0.5

    def __init__(self, b: float, at: float) -> None:
        super().__init__()
        self.path = VE()
        self.b = nn.Parameter(torch.tensor(b, dtype=F64))
        self.data = normal(0.0, self.VAR, self.path)
        self.own = normal(0.0, b**2 * (self.VAR + at**2), self.path)

    def forward(
        self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Any = None, fake: Any = None
    ) -> Tensor:
        if fake is not None:
            return self.own(xt, t) + 0 * self.b
        return self.data(xt, t) if bool((s == t).all()) else self.b * xt


def pull(b: float, t: float, s: float, **changes: Any) -> float:
    """dL/db of the linear student that jumps from t to s, at w_t = 1."""
    points, signs = quantiles(200), torch.tensor([-1.0, 1.0], dtype=F64)
    along, across, own = (
        grid.reshape(-1, 1) for grid in torch.meshgrid(points, signs, points, indexing="ij")
    )
    sd = Linear.VAR**0.5
    size = (sd**2 + t**2) ** 0.5
    x0, eps = sd * (sd * along - t * across) / size, (t * along + sd * across) / size
    m = SelfE(times=Discrete((t / (1 + t),)), decay=0.0, weight=Power(), **changes)
    net = Linear(b, t)
    at = batch(x0, eps, own)
    jump = m.jump(net.path, 1.0, at)
    jump = jump._replace(s=torch.full_like(jump.s, s))
    x = net.b * jump.xt
    opinion = m.opinion(Nets({"student": net}), x.detach(), jump, True, at)
    target = m.target(net.path, x0, x.detach() - opinion.delta, jump)
    (slope,) = torch.autograd.grad(((x - target) ** 2).mean(), net.b)
    return float(slope)


def compromise(t: float, s: float) -> float:
    """b where (b - V / V_t) + lambda b (b^2 V_t / (b^2 V_t + s^2) - V / (V + s^2)) is 0."""
    total = Linear.VAR + t**2
    low, high = 0.0, 2.0
    for _ in range(60):
        b = (low + high) / 2
        gap = b**2 * total / (b**2 * total + s**2) - Linear.VAR / (Linear.VAR + s**2)
        low, high = (low, b) if b - Linear.VAR / total + (t - s) * b * gap > 0 else (b, high)
    return low


@pytest.mark.parametrize(("t", "s"), [(2.5, 0.5), (2.5, 2.0), (80.0, 0.3), (1.0, 1.0)])
def test_a_gaussian_student_ends_between_the_mean_and_the_law(t: float, s: float) -> None:
    """Where the closed form says: the spread of E[x_0 | x_t] at s = t, nearly data's far off."""
    b = compromise(t, s)
    assert abs(pull(b, t, s, renormalise=False)) < 1e-3 * abs(pull(1.3 * b, t, s))
    spread = b * (Linear.VAR + t**2) ** 0.5
    mean = Linear.VAR / (Linear.VAR + t**2) ** 0.5
    assert mean - 1e-9 <= spread < Linear.VAR**0.5
    assert (spread < mean + 1e-9) == (s == t)
    if t == 80:
        assert spread > 0.95 * Linear.VAR**0.5


def test_the_target_by_hand() -> None:
    """At levels 3 and 1 lambda is 2: a third of the datum, renormalised; the datum if dropped."""
    x0 = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]], dtype=F64)
    own = torch.tensor([[0.0, 1.0]], dtype=F64).expand(3, 2)
    t, s = torch.tensor([3.0, 3.0, 3.0], dtype=F64), torch.tensor([1.0, 3.0, 1.0], dtype=F64)
    for path in PATHS:
        at = Jump(x0, *(path.time_of(u / (1 + u)) for u in (t, s)), torch.tensor([1.0, 1.0, 0.0]))
        torch.testing.assert_close(level(path, at.t), t, rtol=1e-6, atol=0)
        plain = SelfE(renormalise=False).target(path, x0, own, at)
        expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]], dtype=F64)
        torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-6)
        scaled = SelfE().target(path, x0, own, at)
        torch.testing.assert_close(scaled[0], 5**0.5 * expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scaled[1:], x0[1:])


def test_the_target_at_pure_noise_is_the_opinion_alone() -> None:
    one = torch.ones(1, dtype=F64)
    at = Jump(one[:, None], one, 0.5 * one, one)
    found = SelfE(renormalise=False).target(Flow(), 3 * one[:, None], 2 * one[:, None], at)
    assert found.tolist() == [[2.0]]


def test_jumps() -> None:
    """Half stay where they are; the others lead to anywhere below in flow time, or as far as it
    has been annealed.
    """
    m = SelfE(anneal=100, auxiliary_from=40, decay=0.0)
    draws = Draws.range(0, 4000)
    b = Batch(torch.zeros(4000, 1), None, torch.zeros(4000, 1), draws)
    for step, reach in ((0, 0.0), (25, 0.25), (100, 1.0), (900, 1.0)):
        loss: Any = m.turns(step)[0].loss
        assert loss.args == (reach, step >= 40)
        at = m.jump(Flow(), reach, b)
        jumped = at.s < at.t
        assert float(jumped.double().mean()) == pytest.approx(0.5 if step else 0.0, abs=0.03)
        if step:
            share = 1 - (at.s / at.t)[jumped]
            assert float(share.max()) == pytest.approx(reach, rel=0.01)
            assert float(share.mean()) == pytest.approx(reach / 2, rel=0.05)
    assert float(at.scale.mean()) == pytest.approx(0.9, abs=0.02)


def test_one_network_learns_all_of_it() -> None:
    """The fake branch has a gradient of its own, of jumps alone; what is told is the average."""
    teacher = Model(MLP(width=16, blocks=1), (2,), 3).build(0).double()
    m = SelfE(kappa=W, diagonal=0.4)
    nets = m.init(None, teacher)
    draws = Draws.range(0, 64)
    b = Batch(draws.normal("z", (2,), F64), draws.integers("l", 3), None, draws)
    b = b._replace(x0=draws.normal("x", (2,), F64))
    student: Any = nets["student"]
    assert student.input_names == ("s", "fake")
    assert set(nets) == {"student", "target"}

    def found(reach: float = 1.0, late: bool = True) -> Loss:
        return m.student_loss(reach, late, nets, teacher, b)

    loss = found()
    assert set(loss.logs) == {"classifier", "auxiliary", "fake"}
    assert float(loss.logs["fake"]) > 0
    assert float(found(0.0).logs["fake"]) == 0  # all at s = t
    early = found(late=False)
    assert float(early.logs["fake"]) == float(early.logs["auxiliary"]) == 0
    before = float(loss.logs["classifier"])
    stirred(nets["target"], 3)
    assert float(found().logs["classifier"]) != before
    weights = [p.detach().clone() for p in nets["target"].parameters()]
    m.after_step(Step(nets, student, 0, 0, 64, {}))
    three = nets["target"].parameters(), weights, student.parameters()
    for p, q, own in zip(*three, strict=True):
        torch.testing.assert_close(
            p.detach(), 0.9999 * q + 0.0001 * own.detach(), rtol=1e-12, atol=0
        )
    assert any(
        float((q - own.detach()).abs().max()) > 0.1
        for q, own in zip(weights, student.parameters(), strict=True)
    )


def test_dropped_conditions_are_learned_from_data() -> None:
    """With drop near 1 nothing but the datum is a target, and no condition is told there."""
    net = Whole()
    b = batch(*(torch.ones(4, 1, dtype=F64),) * 3, labels=True)
    m = SelfE(kappa=W, decay=0.0, drop=0.6, times=Discrete((0.5,)), weight=Power(), diagonal=0.0)
    m = replace(m, renormalise=False)
    total = m.student_loss(1.0, False, Nets({"student": net}), Whole(), b).total
    free = net.both(2 * torch.ones(4, 1, dtype=F64), torch.ones(4, dtype=F64))
    torch.testing.assert_close(total, ((free - 1) ** 2).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kappa": 0.5}, "kappa >= 1"),
        ({"anneal": -1}, "0 or more"),
        ({"diagonal": 1.0}, "shares below 1"),
        ({"drop": 1.0}, "shares below 1"),
        ({"decay": 1.0}, "below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfE(**changes)


def test_guidance_without_conditions_is_refused() -> None:
    b = batch(*(torch.ones(4, 1, dtype=F64),) * 3)
    m = SelfE(kappa=W, decay=0.0)
    with pytest.raises(ValueError, match="guidance needs conditions"):
        m.student_loss(1.0, True, Nets({"student": Whole()}), Whole(), b)
