"""Defaults on another path: the same noise levels, and nothing that was written is moved."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, VP, Bridge, Flow, NoisePath, TrigFlow
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, WithInput
from fewstep.diffusion.time_distributions import (
    Discrete,
    Karras,
    LogNormal,
    OfLevel,
    TimeLaw,
    Uniform,
    Whole,
)
from fewstep.diffusion.types import Sampler
from fewstep.distillation.default_times import with_times_of
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Method
from fewstep.losses.weight import Power
from fewstep.methods.consistency_training import ConsistencyTraining
from fewstep.methods.lcm import LCM
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.reflow import Reflow
from fewstep.methods.rewarded import Rewarded
from fewstep.methods.sfd import SFD
from fewstep.methods.sid import SiD
from fewstep.methods.tdm import TDM
from fewstep.methods.vsd import VSD
from tests.instances import METHODS

SD = VP()
"""Stable Diffusion's betas."""
PATHS = [SD, VP(1e-4, 0.02, schedule="linear"), Flow(), TrigFlow()]
U = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def defaults() -> list[Method]:
    """One of each method, with all that can be left out left out."""
    found: dict[type, Method] = {}
    for method in METHODS:
        cls: Any = type(method)
        if cls not in found and cls is not Rewarded:
            needed = {f.name: getattr(method, f.name) for f in fields(cls) if f.kw_only}
            found[cls] = cls(**needed)
    return list(found.values())


def laws(part: Any, kept: frozenset[str] = frozenset()) -> list[TimeLaw]:
    """All laws of times within a part, in order."""
    if isinstance(part, TimeLaw):
        return [part]
    if not is_dataclass(part) or isinstance(part, NoisePath):
        return []
    values = [getattr(part, f.name) for f in fields(part) if f.name not in kept]
    return [law for value in values for law in laws(value)]


def level(path: NoisePath, t: Tensor) -> Tensor:
    return path.sigma(t) / path.alpha(t)


@each_path
def test_the_levels_are_those_of_the_default(path: NoisePath) -> None:
    """Of every law of every method, over what the path reaches; whole on timesteps."""
    moved = 0
    ends = level(path, torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    for method in defaults():
        other = with_times_of(method, path)
        pairs = zip(laws(method, method.of_levels), laws(other, other.of_levels), strict=True)
        for before, after in pairs:
            if not isinstance(before, Karras | LogNormal | Discrete):
                assert after == before
                continue
            moved += 1
            assert after == OfLevel(before, path)
            low, high = before.share(ends).tolist()
            expected = before.quantile(low + U * (high - low))
            t = after.quantile(U)
            if isinstance(path, VP):
                assert torch.equal(t, t.round())
                near = level(path, t - 0.5), level(path, t + 0.5)
                assert ((near[0] <= expected) & (expected <= near[1])).double().mean() > 0.98
            else:
                torch.testing.assert_close(level(path, t), expected, rtol=1e-5, atol=0)
    assert moved > 30


def test_left_where_they_are_the_levels_would_be_none() -> None:
    """The control: EDM's law taken for timesteps is nearly no noise at all."""
    wrong, right = Karras(0.00316, 71.6).quantile(U), OfLevel(Karras(0.00316, 71.6), SD)
    assert float(level(SD, wrong).max()) < 0.4
    assert float(level(SD, right.quantile(U)).max()) > 10


@each_path
def test_shares_invert_quantiles(path: NoisePath) -> None:
    law = OfLevel(LogNormal(), path)
    t = law.quantile(U)
    if isinstance(path, VP):  # the smallest whole t with P(T <= t) >= u
        assert (law.share(t) >= U - 1e-9).all()
        assert (law.share(t - 1) <= U + 1e-9).all()
    else:
        torch.testing.assert_close(law.share(t), U, rtol=0, atol=1e-6)
    ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    assert law.share(ends).tolist()[1] == 1.0


@each_path
def test_twice_is_once_and_every_sampler_fits(path: NoisePath) -> None:
    """A first call where there is more noise than signal, at the noisiest time for several."""
    for method in defaults():
        once = with_times_of(method, path)
        assert with_times_of(once, path) == once
        if method.paths:
            assert once == method
            continue
        sampler: Any = once.sampler
        while hasattr(sampler, "sampler"):
            sampler = sampler.sampler
        if hasattr(sampler, "ladder"):
            first = sampler.ladder(path)[0]
            one = isinstance(sampler, FewStep) and (sampler.steps, sampler.noise) == (1, "fresh")
            assert one or first == path.t_max or method.needs_signal
            if method.needs_signal:
                assert float(path.alpha(torch.tensor(first, dtype=torch.float64))) > 0.01 * (
                    not isinstance(path, VP)
                )
            assert float(level(path, torch.tensor(first, dtype=torch.float64))) > 0.85


def test_equal_noise_is_the_published_start_of_one_step() -> None:
    """2.5 is timestep 625 of Stable Diffusion, SiD-LSG's (to 3 of 1,000)."""
    first = with_times_of(SiD(), SD).sampler
    assert isinstance(first, FewStep)
    assert abs(first.t_init - 625) <= 3
    flow = with_times_of(SiD(), Flow()).sampler
    assert flow == FewStep(2.5 / 3.5)
    assert with_times_of(TDM(), SD).sampler == FewStep(999.0, 4, "ddim", unit=True)
    assert with_times_of(TDM(), Flow()).sampler == FewStep(1.0, 4, "ddim")
    assert with_times_of(LCM(), SD).sampler == WithInput(FewStep(999.0, 4, unit=True), "w", 0.0)
    assert with_times_of(MeanFlow(), Flow()).sampler == Jumps(1.0)
    assert with_times_of(SFD(), Flow()).sampler == FewStep(1.0, 4, "ddim")  # rho was 2
    heun = with_times_of(OptimalSteps(), Flow()).sampler
    assert isinstance(heun, Heun)
    assert heun.times == OfLevel(Karras(), Flow())


def test_what_is_written_stays() -> None:
    times = Whole(20, 979)
    written = SiD(FewStep(700.0), times=times, fake=FakeScore(times, Power(0, -2)))
    assert with_times_of(written, SD) == written
    part = with_times_of(SiD(FewStep(700.0, 2), fake=FakeScore(weight=Power(0, -2))), SD)
    assert part.sampler == FewStep(700.0, 2)
    assert part.times == OfLevel(Karras(tmax=800.0), SD)
    assert part.fake == FakeScore(OfLevel(LogNormal(), SD), Power(0, -2))
    steps = with_times_of(VSD(FewStep(steps=4)), SD).sampler
    assert steps == FewStep(999.0, 4, unit=True)
    assert with_times_of(VSD(FewStep(times=(999.0, 500.0))), SD).sampler.calls == 2
    inner = with_times_of(LCM(WithInput(FewStep(steps=2), "w", 3.0)), Flow()).sampler
    assert inner == WithInput(FewStep(1.0, 2), "w", 3.0)


def test_methods_within_methods() -> None:
    reward = next(m for m in METHODS if isinstance(m, Rewarded)).reward
    outer = with_times_of(Rewarded(TDM(), reward), Flow())
    assert outer.method == with_times_of(TDM(), Flow())
    assert outer.sampler == outer.method.sampler


def test_laws_of_levels_stay_and_gauges_look_at_their_times() -> None:
    method = ConsistencyTraining()
    other = with_times_of(method, Flow())
    assert other.times == method.times
    assert other.noise_levels(Flow()) == OfLevel(method.times, Flow())
    assert other.noise_levels(VE()) == method.times
    t = Reflow().noise_levels(VE()).quantile(U)
    torch.testing.assert_close((t / (1 + t))[:-1], U[:-1])
    moved = replace(method, sampler=FewStep(1.0))
    assert with_times_of(moved, Flow()) == moved


def test_edms_own_path_and_bridges_are_left() -> None:
    for method in defaults():
        for path in (VE(), Bridge()):
            assert with_times_of(method, path) is method


def test_a_path_without_such_levels_is_refused() -> None:
    law = OfLevel(Uniform(1e-9, 1e-8), SD)
    with pytest.raises(ValueError, match="has no noise levels of Uniform"):
        law.quantile(U)
    assert isinstance(SiD().sampler, Sampler)
    assert math.isfinite(float(OfLevel(LogNormal(), Flow()).quantile(torch.tensor(1.0))))
