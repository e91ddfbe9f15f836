"""Guidance by hand: the formula, the calls it costs, and the conditions it drops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore, predict
from fewstep.distillation.guidance_scales import (
    LSG,
    AntiCFG,
    Guidance,
    Kappas,
    RandomLSG,
    Unguided,
    ZeroCFG,
)
from fewstep.distillation.method import Nets
from fewstep.losses.distance import SquaredL2
from fewstep.losses.weight import Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from tests.conditional import CLASSES, DIM, F64, Conditional, Scene, scene

T = 0.75
FOUR = Kappas(0.5, 2.0, 3.5, -0.5)
Kappa = float | Tensor
PRESETS: dict[Guidance, tuple[Kappa, Kappa, Kappa, Kappa]] = {
    Unguided(): (1.0, 1.0, 1.0, 1.0),
    LSG(): (1.5, 1.5, 1.5, 1.5),
    LSG(4.5): (4.5, 4.5, 4.5, 4.5),
    ZeroCFG(): (0.0, 0.0, 0.0, 1.0),
    AntiCFG(): (-1.0, -1.0, -1.0, 1.0),
    AntiCFG(-0.5): (-0.5, -0.5, -0.5, 1.0),
    FOUR: (0.5, 2.0, 3.5, -0.5),
    Kappas(1.0, 0.0, 1.0, 2.0): (1.0, 0.0, 1.0, 2.0),
}
UNDROPPED = [g for g in PRESETS if g in (Unguided(), ZeroCFG())]
ALONE: Any = {"sampler": FewStep(T), "times": Discrete((T,))}
PLAIN = FakeScore(Discrete((T,)), Power())
CRITIC = Critic(Discrete((T,)), Power())
METHODS: list[Any] = [
    SiD(alpha=1.2, weight=Power(), fake=PLAIN, **ALONE),
    SIM(distance=SquaredL2(), fake=PLAIN, **ALONE),
    DiffInstruct(fake=PLAIN, **ALONE),
    SiDA(alpha=1.2, weight=Power(), fake=CRITIC, **ALONE),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


def batch(count: int = 64, start: int = 0) -> Batch:
    draws = Draws.range(start, count, seed=5)
    x0 = draws.normal("x0", (DIM,), F64)
    return Batch(draws.normal("z", (DIM,), F64), draws.index % CLASSES, x0, draws)


def nets(at: Scene) -> Nets:
    at.teacher.calls.clear()
    at.fake.calls.clear()
    return Nets({"student": at.student, "fake": at.fake})


def noised(at: Scene, b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The student's samples, x_t and t, as every loss here sees them."""
    t = torch.tensor(T, dtype=F64)
    assert b.draws is not None
    x = at.student(T * b.z, t.expand(len(b.z)), b.cond)
    return x, x + T * b.draws.normal("eps", (DIM,)).to(x), t


def mixed(net: Conditional, xt: Tensor, t: Tensor, cond: Tensor, kappa: Kappa) -> Tensor:
    """f(x_t, none) + kappa (f(x_t, c) - f(x_t, none)), kappa one for each sample or for all."""
    kappa = kappa[:, None] if isinstance(kappa, Tensor) else kappa
    return net(xt, t, None) + kappa * (net(xt, t, cond) - net(xt, t, None))


@torch.no_grad()
def by_hand(method: Any, at: Scene, b: Batch, kappas: tuple[Kappa, ...]) -> float:
    """The student's loss, assembled as the module's docstring displays it."""
    x, xt, t = noised(at, b)
    real = mixed(at.teacher, xt, t, b.cond, kappas[3])
    fake, own = (mixed(at.fake, xt, t, b.cond, k) for k in kappas[1:3])
    delta = real - fake
    if isinstance(method, SIM):
        return float((2 * delta * (own - x)).mean())
    if isinstance(method, DiffInstruct):
        return float((-delta * x).mean())
    return float((delta * (own - x)).mean() + (1 - 1.2) * (delta**2).mean())


@torch.no_grad()
def lost(method: Any, at: Scene, b: Batch) -> float:
    """The student's loss by the method; of SiDA, its score term."""
    found = method.turns(0)[1].loss(nets(at), at.teacher, b)
    return float(found.logs.get("score", found.total))


@each_method
@pytest.mark.parametrize("guidance", PRESETS, ids=repr)
def test_students_loss_by_hand(method: Any, guidance: Guidance) -> None:
    at, b = scene(T), batch()
    expected = by_hand(method, at, b, PRESETS[guidance])
    found = lost(replace(method, guidance=guidance), at, b)
    assert found == pytest.approx(expected, rel=1e-11)


@each_method
def test_a_scale_for_each_sample_by_hand(method: Any) -> None:
    """low + (high - low) u, the same u in all four places, and another in another sample."""
    at, b = scene(T), batch()
    assert b.draws is not None
    kappa = (1.5 + 3.0 * b.draws.uniform("kappa")).double()
    assert 1.5 < kappa.min() < 2 < 4 < kappa.max() < 4.5
    expected = by_hand(method, at, b, (kappa,) * 4)
    found = lost(replace(method, guidance=RandomLSG(1.5, 4.5)), at, b)
    assert found == pytest.approx(expected, rel=1e-6)  # kappa is drawn in single precision
    with pytest.raises(ValueError, match=r"needs low < high, got RandomLSG\(low=3, high=2"):
        RandomLSG(3, 2)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=["FakeScore", "Critic"])
@pytest.mark.parametrize("guidance", PRESETS, ids=repr)
def test_fake_scores_loss_by_hand(method: Any, guidance: Guidance) -> None:
    """Under kappa_1, with none of the conditions of which a tenth is dropped."""
    at, b = scene(T), batch(1000)
    assert b.draws is not None
    kappa = torch.full((1000,), PRESETS[guidance][0], dtype=F64)
    if guidance not in UNDROPPED:
        kappa[b.draws.uniform("fake/drop") < 0.1] = 0
    x, xt, t = noised(at, b)
    expected = ((mixed(at.fake, xt, t, b.cond, kappa) - x) ** 2).mean().detach()
    loss = replace(method, guidance=guidance).turns(0)[0].loss(nets(at), at.teacher, b)
    found = loss.logs.get("denoising", loss.total)
    assert float(found) == pytest.approx(float(expected), rel=1e-11)


COND, NONE = ["cond"], ["none"]
CALLS: dict[Guidance, tuple[list[str], list[str], list[str]]] = {
    # fake score in its own turn, in the student's, and the teacher there
    Unguided(): (COND, COND, COND),
    LSG(): (COND + NONE, COND + NONE, COND + NONE),
    RandomLSG(): (COND + NONE, COND + NONE, COND + NONE),
    ZeroCFG(): (NONE, NONE, COND),
    AntiCFG(): (COND + NONE, COND + NONE, COND),
    FOUR: (COND + NONE, COND + NONE, COND + NONE),
    Kappas(1.0, 1.0, 1.0, 4.5): (COND, COND, COND + NONE),
    Kappas(0.0, 0.0, 0.0, 0.0): (NONE, NONE, NONE),
    Kappas(1.0, 1.0, 0.0, 1.0): (COND + NONE, COND + NONE, COND),
    Kappas(1.0, 0.0, 0.0, 1.0, drop=0.0): (COND, NONE, COND),
}


@each_method
@pytest.mark.parametrize("guidance", CALLS, ids=repr)
def test_each_branch_is_called_once_if_at_all(method: Any, guidance: Guidance) -> None:
    """The first branch comes with the features where a critic listens; the others are plain."""
    at, b = scene(T), batch()
    own, fake, teacher = CALLS[guidance]
    turns = replace(method, guidance=guidance).turns(0)
    judges = isinstance(method, SiDA)

    def named(branches: list[str]) -> list[str]:
        first = "both" if judges else "forward"
        return [f"{first} {branches[0]}", *(f"forward {name}" for name in branches[1:])]

    all_nets = nets(at)
    turns[0].loss(all_nets, at.teacher, b)
    heard = "none" if own == NONE else "cond"
    assert at.fake.calls == named(own) + [f"encode {heard}"] * judges
    assert at.teacher.calls == []
    at.fake.calls.clear()
    turns[1].loss(all_nets, at.teacher, b)
    assert at.fake.calls == named(fake)
    assert at.teacher.calls == [f"forward {name}" for name in teacher]


def test_features_are_those_of_the_condition_if_it_is_heard() -> None:
    at, b = scene(T), batch()
    _, xt, t = noised(at, b)
    for kappas, cond in (([1.0], b.cond), ([2.0, 0.0], b.cond), ([0.0], None)):
        features = guided(at.fake, xt, t, b.cond, kappas, tap=True).features
        assert features is not None
        assert torch.equal(features, at.fake.encode(xt, t, cond))
        assert guided(at.fake, xt, t, b.cond, kappas).features is None


def test_a_tenth_of_the_conditions_is_dropped_exactly() -> None:
    """4 standard errors of 20,000 samples; a dropped one gets the unconditional prediction."""
    b, at, count = batch(20_000), scene(T), 20_000
    for guidance, drop in ((LSG(3.0), 0.1), (LSG(3.0, drop=0.3), 0.3), (FOUR, 0.1)):
        kappa = guidance.learning(b)
        assert isinstance(kappa, Tensor)
        dropped = kappa == 0
        assert set(kappa.tolist()) == {0.0, PRESETS.get(guidance, (3.0,))[0]}
        error = (drop * (1 - drop) / count) ** 0.5
        assert abs(float(dropped.double().mean()) - drop) < 4 * error
        _, xt, t = noised(at, b)
        (found,), _ = guided(at.fake, xt, t, b.cond, [kappa])
        assert torch.equal(found[dropped], at.fake(xt, t, None)[dropped])
        plain = mixed(at.fake, xt, t, b.cond, guidance.scales(b).fake_loss)
        assert torch.equal(found[~dropped], plain[~dropped])
        assert not torch.isclose(found[dropped], plain[dropped]).all(1).any()


def test_dropping_is_a_function_of_the_sample_alone() -> None:
    whole, parts = batch(60), [batch(20, start) for start in (0, 20, 40)]
    for guidance in (LSG(3.0), RandomLSG(), AntiCFG()):
        found = torch.cat([torch.as_tensor(guidance.learning(part)) for part in parts])
        assert torch.equal(torch.as_tensor(guidance.learning(whole)), found)
        assert 0 < int((found == 0).sum()) < 20


@pytest.mark.parametrize(
    "guidance",
    [
        Unguided(),
        ZeroCFG(),
        Kappas(1.0, 1.0, 1.0, 4.5),
        Kappas(0.0, 0.0, 0.0, 2.0),
        LSG(3.0, drop=0.0),
        LSG(1.0),
    ],
    ids=repr,
)
def test_nothing_is_dropped_where_only_one_branch_is_used(guidance: Guidance) -> None:
    """Not even a random number is drawn."""
    without = batch()._replace(draws=None)
    assert guidance.learning(without) == guidance.scales(without).fake_loss


@pytest.mark.parametrize("kappas", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)])
def test_conditions_are_dropped_where_any_loss_uses_both_branches(
    kappas: tuple[float, float, float],
) -> None:
    found = Kappas(*kappas).learning(batch(1000))
    assert isinstance(found, Tensor)
    assert int((found == 0).sum()) > 50


def test_negative_guidance_by_hand() -> None:
    at, b = scene(T), batch()
    _, xt, t = noised(at, b)
    (found,), _ = guided(at.fake, xt, t, b.cond, [-1.0])
    expected = 2 * at.fake(xt, t, None) - at.fake(xt, t, b.cond)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_each_scale_changes_its_own_prediction_alone() -> None:
    at, b = scene(T), batch()
    x, _, _ = noised(at, b)

    def predictions(*kappas: float) -> Any:
        return predict(nets(at), at.teacher, b, x, Discrete((T,)), Kappas(*kappas))

    plain = predictions(1.0, 1.0, 1.0, 1.0)
    assert torch.equal(plain.fake, plain.own)
    names = (None, "fake", "own", "real")
    for place, changed in enumerate(names):
        kappas = [1.0, 1.0, 1.0, 1.0]
        kappas[place] = 2.0
        found = predictions(*kappas)
        for name in ("fake", "own", "real"):
            same = torch.equal(getattr(found, name), getattr(plain, name))
            assert same == (name != changed)


@each_method
def test_control_swapped_scales(method: Any) -> None:
    at, b = scene(T), batch()
    right = lost(replace(method, guidance=FOUR), at, b)
    for wrong in ((0.5, 3.5, 2.0, -0.5), (0.5, -0.5, 3.5, 2.0), (0.5, 2.0, 3.5, 0.5)):
        assert abs(lost(replace(method, guidance=Kappas(*wrong)), at, b) - right) > 1e-2 * abs(
            right
        )
    other_own = lost(replace(method, guidance=Kappas(9.0, 2.0, 1.0, -0.5)), at, b)
    assert (other_own == right) == isinstance(method, DiffInstruct)


@each_method
@pytest.mark.parametrize("guidance", [LSG(), ZeroCFG(), AntiCFG(), RandomLSG()], ids=repr)
def test_guidance_without_conditions_is_refused(method: Any, guidance: Guidance) -> None:
    at, free = scene(T), batch()._replace(cond=None)
    every = nets(at)
    every["student"] = at.fake
    sentence = "guidance needs conditions, but this batch has none (an unconditional model); "
    for turn in replace(method, guidance=guidance).turns(0):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
            turn.loss(every, at.teacher, free)
        assert str(caught.value) == sentence + "use Unguided()"
    for turn in replace(method, guidance=Unguided()).turns(0):
        assert turn.loss(every, at.teacher, free).total.isfinite()
