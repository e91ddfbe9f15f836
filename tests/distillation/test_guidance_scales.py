"""Whole methods under guidance against the closed forms of `conditional`.

200,000 samples of two classes, in fifty parts, whose spread gives the standard errors: a gradient
agrees if every component is within four of them, and the whole within 3 % in norm.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.guidance_scales import (
    LSG,
    AntiCFG,
    Guidance,
    Kappas,
    RandomLSG,
    Unguided,
    ZeroCFG,
)
from fewstep.distillation.method import Method, Nets
from fewstep.losses.distance import PseudoHuber, SquaredL2
from fewstep.losses.weight import Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from tests import gaussians as closed
from tests.conditional import CLASSES, DIM, F64, Scene, scene

PARTS, PART = 50, 4000
FOUR = Kappas(0.5, 2.0, 3.5, -0.5)
SCALES: dict[Guidance, tuple[float, float, float]] = {  # kappa_2, kappa_3, kappa_4
    Unguided(): (1.0, 1.0, 1.0),
    LSG(3.0): (3.0, 3.0, 3.0),
    ZeroCFG(): (0.0, 0.0, 1.0),
    AntiCFG(-1.0): (-1.0, -1.0, 1.0),
    FOUR: (2.0, 3.5, -0.5),
}


def settings(guidance: Guidance, t: float) -> dict[str, Any]:
    """One call at t and losses at t too."""
    return {"sampler": FewStep(t), "times": Discrete((t,)), "guidance": guidance}


def sampled(method: Method, at: Scene) -> tuple[Tensor, Tensor]:
    """The student's gradient, D times the loss, and its standard error."""
    nets = Nets({"student": at.student, "fake": at.fake})
    loss = {turn.net: turn for turn in method.turns(0)}["student"].loss
    found = []
    for part in range(PARTS):
        draws = Draws.range(part * PART, PART, seed=4)
        batch = Batch(draws.normal("z", (DIM,), F64), draws.index % CLASSES, None, draws)
        (DIM * loss(nets, at.teacher, batch).total).backward()
        found.append(at.student.gradient())
    each = torch.stack(found)
    return each.mean(0), each.std(0) / PARTS**0.5


def agrees(method: Method, at: Scene, reference: Tensor) -> None:
    mean, error = sampled(method, at)
    assert ((mean - reference).abs() / error).max() <= 4
    assert (mean - reference).norm() <= 3e-2 * reference.norm()


@cache
def at_level(path: NoisePath) -> Scene:
    return scene({"VE": 0.75, "Flow": 0.375, "VP": 400.0}[type(path).__name__], path)


def test_the_closed_forms_are_the_unguided_ones_at_one() -> None:
    """Two derivations, one by score differences and one by quadratic forms: to 1e-11."""
    for path in (VE(), Flow(), VP()):
        at = at_level(path)
        settings = [at.setting(c) for c in range(CLASSES)]
        for alpha in (0.5, 1.0, 1.2):
            parts = [closed.sid_gradient(s, alpha) for s in settings]
            found = at.gradient("sid", (1.0, 1.0, 1.0), alpha)
            torch.testing.assert_close(found, joined(parts), rtol=1e-11, atol=1e-13)
        parts = [
            closed.gradient(closed.kl_divergence, s) * (s.sigma / s.alpha) ** 2 for s in settings
        ]
        found = at.gradient("kl", (1.0, 1.0, 1.0))
        torch.testing.assert_close(found, joined(parts), rtol=1e-11, atol=1e-13)


def joined(parts: list[Tensor]) -> Tensor:
    """(a, B) of each class -> all a, all B, of the mean over classes."""
    a, b = [p[:DIM] for p in parts], [p[DIM:] for p in parts]
    return torch.cat([*a, *b]) / CLASSES


@pytest.mark.parametrize("guidance", SCALES, ids=repr)
def test_guided_sid(guidance: Guidance) -> None:
    """At alpha = 1, where kappa_2 and kappa_3 stand in different factors."""
    at = at_level(VE())
    method = SiD(alpha=1.0, weight=Power(), **settings(guidance, at.t))
    agrees(method, at, at.gradient("sid", SCALES[guidance]))


@pytest.mark.parametrize("path", [Flow(), VP()], ids=repr)
def test_guided_sid_on_other_paths_and_at_other_alpha(path: NoisePath) -> None:
    at = at_level(path)
    method = SiD(alpha=1.2, weight=Power(), **settings(FOUR, at.t))
    agrees(method, at, at.gradient("sid", SCALES[FOUR], alpha=1.2))


@pytest.mark.parametrize("guidance", [LSG(3.0), FOUR], ids=repr)
def test_guided_sim(guidance: Guidance) -> None:
    """The squared distance in score units: 2 alpha^2 / sigma^4 times SiD at alpha = 1."""
    at = at_level(Flow())
    s = at.setting(0)
    method = SIM(distance=SquaredL2(), scale=Power(1, -2), **settings(guidance, at.t))
    reference = 2 * s.alpha**2 / s.sigma**4 * at.gradient("sid", SCALES[guidance])
    agrees(method, at, reference)


@pytest.mark.parametrize("guidance", [LSG(3.0), FOUR], ids=repr)
def test_guided_kl(guidance: Guidance) -> None:
    at = at_level(VE())
    method = DiffInstruct(weight=Power(2, -2), **settings(guidance, at.t))
    agrees(method, at, at.gradient("kl", SCALES[guidance]) / at.t**2)


def test_scales_drawn_for_each_sample() -> None:
    """SiD is a polynomial of degree two in kappa: its mean on [low, high] by quadrature."""
    at = at_level(VE())
    nodes, weights = np.polynomial.legendre.leggauss(3)
    means = [
        0.5 * float(w) * at.gradient("sid", (k, k, k))
        for k, w in zip(3.0 + 1.5 * nodes, weights, strict=True)
    ]
    method = SiD(alpha=1.0, weight=Power(), **settings(RandomLSG(1.5, 4.5), at.t))
    agrees(method, at, torch.stack(means).sum(0))


def test_control_other_scales() -> None:
    """Each closed form is more than 10 % off with any one scale changed, or two swapped."""
    at = at_level(VE())
    right = at.gradient("sid", (2.0, 3.5, -0.5))
    for wrong in ((3.5, 2.0, -0.5), (1.0, 3.5, -0.5), (2.0, 1.0, -0.5), (2.0, 3.5, 1.0)):
        assert (at.gradient("sid", wrong) - right).norm() > 0.1 * right.norm()
    plain, long = (at.gradient("kl", (k, k, k)) for k in (1.0, 3.0))
    assert (long - plain).norm() > 0.1 * plain.norm()
    other = at.gradient("kl", (3.0, 9.0, 3.0))
    assert torch.equal(other, long)  # kappa_3 has no part in it


METHODS: list[Any] = [
    SiD(weight=Power()),
    SiD(),
    SIM(distance=PseudoHuber(0.5)),
    DiffInstruct(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("guidance", [LSG(3.0), RandomLSG(), ZeroCFG(), AntiCFG()], ids=repr)
def test_equal_networks_are_a_fixed_point_of_long_and_short_guidance(
    method: Any, guidance: Guidance
) -> None:
    """fake == teacher, with and without class: no sample has a gradient, under LSG alone.

    No more of one than the rounding of the sum of four branches, where another guidance leaves
    at least a hundredth.
    """
    at = scene()
    nets = Nets({"student": at.student, "fake": at.teacher})
    loss = replace(method, **settings(guidance, at.t)).turns(0)[1].loss
    sizes = []
    for sample in range(20):
        draws = Draws.range(sample, 1)
        batch = Batch(draws.normal("z", (DIM,), F64), draws.index % CLASSES, None, draws)
        loss(nets, at.teacher, batch).total.backward()
        sizes.append(float(at.student.gradient().abs().max()))
    if isinstance(guidance, (LSG, RandomLSG)):
        assert max(sizes) < 1e-14
    else:
        assert min(sizes) > 1e-2
