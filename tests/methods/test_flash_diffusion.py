"""Flash Diffusion: the law of times, the teacher's target, three terms by closed forms, stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.losses.weight import Power
from fewstep.methods.flash_diffusion import FlashDiffusion
from fewstep.teachers.gaussian import Gaussian
from tests import instances
from tests.exact_judges import judged
from tests.losses.test_adversarial_optima import MU, OPTIMUM, A, B, V, log_ratio
from tests.mixture import MODEL
from tests.quadrature import F64, Line, batch


def test_the_law_of_times() -> None:
    """Four peaks at the student's times, whose neighbours are e^-2 = 0.135 as likely."""
    m = FlashDiffusion()
    for stage, weights in enumerate(m.shares):
        p = m.law(stage)
        assert p.shape == (32,)
        assert float(p.sum()) == pytest.approx(1)
        for j, w in enumerate(weights):
            peak, before, after = (float(p[8 * j + k]) for k in (0, -1 if j else 1, 1))
            assert peak / float(p.max()) == pytest.approx(w / max(weights), abs=1e-9)
            assert (before, after) == pytest.approx((math.exp(-2) * peak,) * 2, abs=1e-9)
    ladder = m.ladder(VE())
    assert [ladder[8 * j] for j in range(4)] == FewStep(2.5, 4).ladder(VE())


def test_times_and_scales_are_drawn_for_a_step() -> None:
    """500 steps of the last stage: four standard errors of a third are 0.085."""
    m = FlashDiffusion(kappa=(3.0, 13.0), stage_steps=10)
    drawn = [m.drawn(step) for step in range(30, 530)]
    assert drawn[5] == m.drawn(35)
    assert {stage for stage, _, _ in drawn} == {3}
    index = torch.tensor([i for _, i, _ in drawn])
    p = m.law(3)
    for i in (0, 1, 8, 16):
        assert float((index == i).double().mean()) == pytest.approx(float(p[i]), abs=0.09)
    kappas = torch.tensor([kappa for _, _, kappa in drawn])
    assert 3 < float(kappas.min()) < 3.2
    assert 12.8 < float(kappas.max()) < 13
    assert [m.drawn(step)[0] for step in (0, 9, 10, 39, 40, 400)] == [0, 0, 1, 3, 3, 3]
    assert FlashDiffusion().drawn(0)[2] == 1


@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++", "unipc"])
def test_the_target_is_the_end_of_the_solver(path: NoisePath, solver: Any) -> None:
    """From pure noise the teacher's own samples; from noised data, where x_0 is known, x_0."""
    start = {"VE": 2.5, "Flow": 1.0, "VP": 999.0}[type(path).__name__]
    m = FlashDiffusion(FewStep(start, 2), 8, solver=solver, shares=((1, 1),), gan=(0,), dmd=(0,))
    net: Any = instances.TEACHERS["mixture"](path)
    draws = Draws.range(0, 30)
    z, x0 = draws.normal("z", (2,), F64), draws.normal("x0", (2,), F64)
    given = Batch(z, None, x0, draws)
    times = Discrete(tuple(reversed(m.ladder(path))))
    order = {"ddim": 1, "heun": 2}
    own: Any = (
        Heun(times, 8, order[solver])
        if solver in order
        else MultiStep(times, 8, solver, 3 if solver == "unipc" else 2)
    )
    torch.testing.assert_close(m.target(0, 1.0, net, given), own(net, z), rtol=1e-6, atol=1e-6)

    class Knowing:
        """It returns the data: every solver leads there."""

        def __init__(self) -> None:
            self.path, self.times = path, []

        def __call__(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            self.times.append(float(t.flatten()[0]))
            if len(self.times) == 1:
                level = t.flatten()[0]
                expected = path.alpha(level) * x0 + path.sigma(level) * z
                torch.testing.assert_close(xt, expected)
            return x0

    knowing: Any = Knowing()
    torch.testing.assert_close(m.target(5, 1.0, knowing, given), x0)
    assert sorted(set(knowing.times), reverse=True) == pytest.approx(m.ladder(path)[5:])


def test_three_terms() -> None:
    """At pure noise: squares by hand, the gradient of KL, and that of least squares' h.

    The last two as recorded from an independent script, times their weights.
    """
    s = 0.5
    judge = Discriminator(Discrete((s,)), loss="least_squares")
    m = FlashDiffusion(
        FewStep(2.0),
        1,
        shares=((1.0,),),
        gan=(2.0,),
        dmd=(3.0,),
        times=Discrete((s,)),
        weight=Power(2, -2),
        judge=judge,
    )
    student = Line(A, B)
    nets = judged(student, lambda x: OPTIMUM["least_squares"](log_ratio(x, s).exp()))
    nets["fake"] = Readable(A, B**2)
    teacher: Any = Readable(MU, V)
    at = batch(300)
    at = at._replace(x0=MU + V**0.5 * at.z)
    loss = m.student_loss(0, 0, 1.0, nets, teacher, at)
    assert loss.total is not None
    k = V / (V + 4)  # the teacher's only call: 1 + k (x_t - 1), x_t = 2 z
    off, tilt = A - (1 - k), B - 2 * k
    assert float(loss.logs["regression"].detach()) == pytest.approx(off**2 + tilt**2, rel=1e-6)
    expected = [
        2 * off + 3 * -1.6 + 2 * -0.3024243,
        2 * tilt + 3 * 0.7011236 + 2 * 0.0653634,
    ]
    assert student.gradient(loss.total).tolist() == pytest.approx(expected, rel=5e-3)
    found = student.gradient(loss.logs["score"]).tolist()
    assert found == pytest.approx([-1.6, 0.7011236], rel=5e-3)


class Readable(Gaussian):
    """An exact denoiser whose encoder features are x_t."""

    def __init__(self, mean: float, variance: float) -> None:
        law = torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64)
        super().__init__(*law, VE())

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


def test_the_judge_rests_between_data_and_samples() -> None:
    """Of the data N(MU, V) and the student N(A, B^2), and not of the two the other way round."""
    s = 0.5
    m = FlashDiffusion(
        FewStep(2.0), 1, shares=((1.0,),), gan=(1.0,), dmd=(0.0,), judge=at_level(s)
    )
    teacher: Any = Readable(MU, V)
    for swapped in (False, True):
        student = Line(MU, V**0.5) if swapped else Line(A, B)
        nets = judged(student, lambda x: OPTIMUM["least_squares"](log_ratio(x, s).exp()))
        at = batch(300)
        at = at._replace(x0=A + B * at.z if swapped else MU + V**0.5 * at.z)
        total = m.judge_loss(0, nets, teacher, at).total
        judge: Any = nets["discriminator"]
        assert total is not None
        slope = judge.unrest(total)
        assert slope > 0.1 if swapped else slope < 2e-3


def at_level(s: float) -> Discriminator:
    return Discriminator(Discrete((s,)), loss="least_squares")


def test_what_a_stage_trains() -> None:
    m = FlashDiffusion(stage_steps=10)
    names = {step: [turn.net for turn in m.turns(step)] for step in (0, 9, 10, 35, 100)}
    alone, all_three = ["student"], ["fake", "discriminator", "student"]
    assert names == {0: alone, 9: alone, 10: all_three, 35: all_three, 100: all_three}
    teacher: Any = MODEL.build()
    assert set(m.init(teacher, teacher)) == {"student", "fake", "discriminator"}
    plain = replace(m, gan=(0.0,) * 4, dmd=(0.0,) * 4)
    assert set(plain.init(teacher, teacher)) == {"student"}
    assert [turn.net for turn in plain.turns(20)] == ["student"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_times": 30}, r"teacher_times a multiple of its steps, and width > 0; got Few"),
        ({"gan": (0.1,)}, r"of every stage, and stage_steps >= 1; got 4, 1 and 4 of them"),
        ({"shares": ((0.5, 0.5),) * 4}, r"weights of the sampler's 4 calls in each stage, got"),
        ({"dmd": (0.0, 0.0, 0.0, -1.0)}, r"FlashDiffusion.gan and dmd are 0 or more, and its"),
        ({"kappa": (3.0, 1.0)}, r"FlashDiffusion.kappa is two scales in order, got \(3.0, 1.0\)"),
        ({"sampler": Heun()}, r"FlashDiffusion.sampler is a FewStep, as its calls are trained"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FlashDiffusion(), **change)
