"""FlashDMD: one loss a call, each at rest at its own law; whose weights the fake score takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch, Cond
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets, Step
from fewstep.distillation.pictures import give_decoder
from fewstep.distillation.preferences import Preference
from fewstep.eval.picture_networks import Ink
from fewstep.losses.weight import Power
from fewstep.methods.flash_dmd import FlashDMD
from fewstep.nets.mlp import MLP
from tests.exact_judges import Exact, Glass
from tests.losses.test_adversarial_optima import (
    A as OFF,
    B as WIDE,
    generator_gradient,
    log_ratio,
)
from tests.methods.test_rewarded import MU, Slope, V, gaussian
from tests.quadrature import F64

S, FIRST, SECOND = 0.5, 2.5, 1.25
"""The noise of both losses, and the times of two calls."""
Pair = tuple[float, float]


class Calls(nn.Module):
    """Call k makes N(a_k, b_k^2) of what it is given, each with numbers of its own."""

    path = VE()

    def __init__(self, first: Pair, second: Pair) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.tensor(p, dtype=F64)) for p in (first, second)
        )

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        (a, b), (c, d) = self.first, self.second
        if float(t[0]) == FIRST:
            return a + b * xt / FIRST
        return c + d * (xt - a.detach()) / (b.detach() ** 2 + SECOND**2) ** 0.5


METHOD = FlashDMD(
    FewStep(times=(FIRST, SECOND)),
    matched=1,
    times=Discrete((S,)),
    weight=Power(2, -2),
    judge=Discriminator(Discrete((S,))),
    gan=0.7,
)


def numbers(count: int) -> Batch:
    draws = Draws.range(0, count)
    return Batch(draws.normal("z", (1,), F64), None, draws.normal("x0", (1,), F64), draws)


def gradients(k: int, first: Pair, second: Pair, count: int = 100_000) -> list[float]:
    """Of the loss of call k in all four numbers, with an exact fake score and judge."""
    student = Calls(first, second)
    nets = Nets({"student": student, "fake": gaussian(first[0], first[1] ** 2)})
    nets["discriminator"] = Exact(lambda x: log_ratio(x, S))
    loss = METHOD.matching_loss if k == 1 else METHOD.adversarial_loss
    teacher: Any = gaussian(MU, V) if k == 1 else Glass()
    total = loss(Rollout(METHOD.sampler, k), nets, teacher, numbers(count)).total
    assert total is not None
    total.backward()
    grads = [p.grad for p in (student.first, student.second)]
    return [float(g) for part in grads for g in ([0, 0] if part is None else part)]


def test_the_first_call_is_matched_to_the_teacher_and_nothing_else() -> None:
    """The gradient of KL at the level, exactly in b = V^(1/2); zero at the teacher's own law."""
    a, b = 0.3, V**0.5
    found = gradients(1, (a, b), (7.0, 3.0), 40_000)
    mean = float(numbers(40_000).z.mean())
    assert found[0] == pytest.approx((a - MU) / (V + S * S), rel=1e-9)
    assert found[1] == pytest.approx((a - MU) / (V + S * S) * mean, rel=1e-6)
    assert found[2:] == [0, 0]
    narrow = gradients(1, (MU, 0.2), (7.0, 3.0))[1]
    exact = 0.2 * (1 / (V + S * S) - 1 / (0.04 + S * S))
    assert narrow == pytest.approx(exact, rel=0.02)
    assert max(map(abs, gradients(1, (MU, b), (7.0, 3.0), 400))) < 1e-12


def test_the_second_call_learns_from_the_judge_and_nothing_else() -> None:
    """The generator's gradient at the optimal judge, by quadrature; not of the first call."""
    found = gradients(2, (0.4, 0.9), (OFF, WIDE))
    exact = 0.7 * generator_gradient("nonsaturating", S)
    assert found[:2] == [0, 0]
    assert found[2:] == pytest.approx(exact.tolist(), abs=6e-3)
    assert max(map(abs, exact.tolist())) > 0.1


def test_a_step_learns_at_one_call_and_the_fake_score_at_those_that_are_matched() -> None:
    method = FlashDMD(ratio=2)
    seen = set()
    for step in range(60):
        turns = method.turns(step)
        k = method.call(step)
        names = ["fake", "fake", *(["discriminator"] if k > 2 else []), "student"]
        assert [turn.net for turn in turns] == names
        learned: Any = turns[0].loss
        made: Any = turns[-1].loss
        assert made.args[0].k == k
        assert learned.args[0].k == (k if k <= 2 else method.high_call(step))
        assert made.func.__name__ == ("matching_loss" if k <= 2 else "adversarial_loss")
        seen |= {(k, learned.args[0].k)}
    assert seen == {(1, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)}


def net(seed: int) -> Any:
    return Model(MLP(8, 1), (2,)).build(seed)


def moved(method: FlashDMD, step: int) -> Nets:
    """Networks after the end of a step: the student of seed 1, the others of 2 and 3."""
    nets = Nets({"student": net(1), "fake": net(2), "reference": net(3)})
    method.after_step(Step(nets, nets["student"], step, 0, 1, {}))
    return nets


def same(mine: nn.Module, weights: list[Tensor]) -> bool:
    return all(torch.allclose(p, w) for p, w in zip(mine.parameters(), weights, strict=True))


def test_the_fake_score_takes_a_part_of_the_student() -> None:
    """By hand; nothing at keep 1, and nothing in steps of preferences."""
    both = list(zip(net(2).parameters(), net(1).parameters(), strict=True))
    mixed = [0.75 * mine + 0.25 * other for mine, other in both]
    assert same(moved(FlashDMD(keep=0.75), 5)["fake"], mixed)
    own = [mine for mine, _ in both]
    assert same(moved(FlashDMD(keep=1.0), 5)["fake"], own)
    second = FlashDMD(keep=0.75, preference=Preference(Ink()), preferred_from=4, share=2)
    assert [same(moved(second, step)["fake"], own) for step in range(3, 8)] == [
        *(False, True, True, False, True)
    ]


def test_the_reference_is_the_student_as_the_second_stage_begins() -> None:
    second = FlashDMD(preference=Preference(Ink()), preferred_from=4)
    fresh, student = ([*net(seed).parameters()] for seed in (3, 1))
    for step, weights in ((2, fresh), (3, student), (4, fresh)):
        assert same(moved(second, step)["reference"], weights)
    assert "reference" not in FlashDMD().init(net(4), net(1))
    assert "reference" in second.init(net(4), net(1))


def test_preferences_come_in_a_row_and_distillation_goes_on() -> None:
    """Five to one, at the matched calls; the loss is that of PSO."""
    preference = Preference(Slope(), 0.5, 1e-9, 1e9)
    method = FlashDMD(preference=preference, preferred_from=10)
    kinds = [method.prefers(step) for step in range(22)]
    assert kinds == [False] * 10 + ([True] * 5 + [False]) * 2
    assert not any(FlashDMD().prefers(step) for step in range(2000))
    nets = Nets({"student": net(1), "reference": net(3)})
    give_decoder(nets["reference"], lambda x: x[:, None, None])
    draws = Draws.range(0, 6)
    batch = Batch(draws.normal("z", (2,)), None, None, draws)
    teacher: Any = nets["reference"]
    for step in (10, 11, 14):
        (turn,) = method.turns(step)
        k = method.high_call(step)
        assert 1 <= k <= 2
        expected = preference.loss(method.sampler, k, nets, teacher, batch).total
        assert turn.loss(nets, teacher, batch).total == expected


def test_what_does_not_fit_is_refused() -> None:
    for matched in (0, 4):
        with pytest.raises(ValueError, match=r"^FlashDMD.matched is at least 1 and less than"):
            FlashDMD(matched=matched)
    for wrong in ({"keep": 1.5}, {"gan": 0.0}):
        with pytest.raises(ValueError, match=r"^FlashDMD needs keep from 0 to 1 and"):
            FlashDMD(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^FlashDMD's fake score learns by denoising alone"):
        FlashDMD(judge=Discriminator(features="fake"))
    prefers = Preference(Ink())
    with pytest.raises(ValueError, match=r"^FlashDMD.sampler is a FewStep of 2 calls or more"):
        FlashDMD(FewStep(2.5, 4, "ddim"), preference=prefers)
    with pytest.raises(ValueError, match=r"^FlashDMD.preferred_from and share are 1 or more"):
        FlashDMD(preference=prefers, preferred_from=0)
    with pytest.raises(ValueError, match=r"^FlashDMD mixes weights of the student into the fake"):
        FlashDMD().init(net(1), Model(MLP(16, 1), (2,)).build(0))
