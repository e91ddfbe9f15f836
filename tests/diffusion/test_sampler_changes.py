"""Other numbers of steps, and starts from the middle of the path."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.diffusion.assisted import Corrected
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.policies import FollowPolicy
from fewstep.diffusion.sampler_changes import from_share, in_steps
from fewstep.diffusion.samplers import (
    Ancestral,
    FewStep,
    Heun,
    JumpBack,
    Jumps,
    MultiStep,
    WithInput,
    course,
)
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Sampler
from fewstep.teachers.gaussian import Gaussian

FITTED = LinearSolver(times=(2.0, 0.5), a=((0.3,), (0.05, 0.2)), c=((0.6,), (-0.1, 0.9)))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (FewStep(2.5), FewStep(2.5, 4)),
        (FewStep(2.5, 2, "ddim", rho=2.0), FewStep(2.5, 4, "ddim", rho=2.0)),
        (FewStep(times=(2.5, 0.3)), FewStep(2.5, 4)),
        (FewStep(times=(2.5, 2.4, 0.3, 0.1)), FewStep(times=(2.5, 2.4, 0.3, 0.1))),
        (Ancestral(2.5, 2), Ancestral(2.5, 4)),
        (JumpBack(2.5), JumpBack(2.5, 4)),
        (Jumps(2.5, rho=2.0), Jumps(2.5, 4, 2.0)),
        (Heun(Karras(), 18), Heun(Karras(), 4)),
        (MultiStep(Karras(), 9, "unipc"), MultiStep(Karras(), 4, "unipc")),
        (LinearSolver(6, order=2), LinearSolver(4, order=2)),
        (LinearSolver(times=(2.0, 0.5)), LinearSolver(4, t_init=2.0)),
        (ParallelDecoding(1.0, 1, 16), ParallelDecoding(1.0, 4, 16)),
        (FollowPolicy(1.0), FollowPolicy(1.0, 4)),
        (WithInput(FewStep(2.5), "w", 3.0), WithInput(FewStep(2.5, 4), "w", 3.0)),
        (CFG(Heun(), 2.0, 0.1, 3.0), CFG(Heun(steps=4), 2.0, 0.1, 3.0)),
        (Corrected(0.3), Corrected(0.3, 1, FewStep(steps=4))),
    ],
    ids=repr,
)
def test_four_steps(sampler: Sampler, expected: Sampler) -> None:
    assert in_steps(sampler, 4) == expected
    assert in_steps(expected, 4) == expected


@pytest.mark.parametrize("sampler", [FITTED, ScaleWise((2.5, 1.0), (1, 1))], ids=repr)
def test_samplers_with_a_course_of_their_own_keep_it(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=r"in steps of its own, by \w+, in 2 calls"):
        in_steps(sampler, 4)
    with pytest.raises(ValueError, match="starts at its own times alone"):
        from_share(sampler, VE(), 0.5)
    with pytest.raises(ValueError, match="is a multiple of its steps"):
        in_steps(ParallelDecoding(1.0, 1, 16), 3)


PATHS: tuple[NoisePath, ...] = (VE(), Flow(), TrigFlow(), VP())
AT_HALF = {VE(): 1.0, Flow(): 0.5, TrigFlow(): math.pi / 4}
"""Where sigma = alpha."""


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", [FewStep, Ancestral, Jumps, JumpBack])
def test_students_start_at_the_share(path: NoisePath, kind: type[FewStep]) -> None:
    """In as many steps, where alpha = sigma; a share beyond their start is their start."""
    own = kind(path.t_max, 3)
    moved = from_share(own, path, 0.5)
    first = course(moved, path).times[0]
    assert moved.calls == 3
    t = torch.tensor(first, dtype=torch.float64)
    assert float(path.alpha(t)) == pytest.approx(float(path.sigma(t)), rel=0.01)
    assert path not in AT_HALF or first == pytest.approx(AT_HALF[path], rel=1e-6)
    low = kind(min(2.0, path.t_max / 4) // 1 or 0.25, 1)
    assert from_share(low, path, 0.999) == low


def test_timesteps_are_whole_and_enough() -> None:
    assert from_share(FewStep(999.0, 4), VP(), 0.5) == FewStep(354.0, 4)
    assert from_share(FewStep(999.0, 4), VP(), 0.01) == FewStep(4.0, 4)


def test_solvers_keep_their_own_times_below() -> None:
    """One more time, the share's own, and all of theirs below it."""
    own = Heun(Karras(), 18)
    grid = own.grid(torch.empty(0, dtype=torch.float64)).tolist()
    for solver in (own, MultiStep(Karras(), 18, "dpm++")):
        moved = from_share(solver, VE(), 0.75)
        assert isinstance(moved, Heun | MultiStep)
        found = moved.grid(torch.empty(0, dtype=torch.float64)).tolist()
        assert found == [3.0, *(t for t in grid if t < 3)]
        assert 5 < len(found) < 18
        assert type(moved) is type(solver)
    assert course(from_share(own, VE(), 0.9999), VE()).times == course(own, VE()).times
    guided = from_share(CFG(own, 2.0), VE(), 0.75)
    assert guided == CFG(from_share(own, VE(), 0.75), 2.0)
    lowest = from_share(own, VE(), 1e-6)
    assert lowest.calls == 1


def test_an_exact_teacher_finishes_from_anywhere() -> None:
    """From x_t of the path's law, the solver of an exact teacher ends with the data's."""
    mean = torch.tensor([0.4, -0.7])
    teacher = Gaussian(mean, 0.3)
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = from_share(Heun(Karras(), 40), VE(), 0.5)(teacher, mean + 1.3**0.5 * z)
    assert torch.allclose(x.mean(0), mean, atol=0.02)
    assert torch.allclose(x.std(0), torch.full((2,), 0.3**0.5), atol=0.02)


def test_fixed_noise_is_that_of_the_start_no_more() -> None:
    assert from_share(FewStep(2.5, 2, "fixed"), VE(), 0.5) == FewStep(1.0, 2, "fresh")
    assert from_share(FewStep(times=(2.5, 0.3)), VE(), 0.5) == FewStep(1.0, 2)
    assert from_share(LinearSolver(4), VE(), 0.5) == LinearSolver(4, t_init=1.0)
