"""Resolutions that grow: sizes, noise, and what each call is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, course
from fewstep.diffusion.scale_wise import ScaleWise, enlarged, reduced, reduced_noise

F64 = torch.float64
DRAWS = Draws.range(0, 5)
Z = DRAWS.normal("z", (1, 8, 8), F64)


class Half:
    """x_t / 2, of any size."""

    def __init__(self, path: NoisePath = VE()) -> None:
        self.path = path

    def __call__(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt / 2


def test_reduced_by_hand() -> None:
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert torch.equal(reduced(x, 2), torch.tensor([[[[2.5, 4.5]]]]))
    assert torch.equal(reduced(x[0], 2), torch.tensor([[[0.5, 2.5], [4.5, 6.5]]]))
    assert torch.equal(reduced(x, 1), x)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) has no 3 times smaller one"):
        reduced(x, 3)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8), (1, 2, 2, 2)], ids=str)
def test_smaller_noise_is_standard_normal(shape: tuple[int, ...]) -> None:
    """The map of noise to noise has orthonormal rows."""
    size = torch.ones(shape).numel()
    basis = torch.eye(size, dtype=F64).reshape(size, *shape)
    rows = reduced_noise(basis, 2).flatten(1)
    torch.testing.assert_close(rows.T @ rows, torch.eye(rows.shape[1], dtype=F64))


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (3, 2, 4, 4), (3, 2, 2, 2, 2)], ids=str)
def test_what_is_even_stays_even(shape: tuple[int, ...]) -> None:
    """And a vector stays as it is."""
    x = torch.full(shape, 0.7, dtype=F64)
    large = enlarged(x, 2)
    assert large.shape == (*shape[:2], *(2 * size for size in shape[2:]))
    torch.testing.assert_close(large, torch.full_like(large, 0.7))
    torch.testing.assert_close(reduced(large, 2), x)


@pytest.mark.parametrize(("path", "times"), [(VE(), (2.5, 1.0)), (Flow(), (1.0, 0.6))], ids=str)
def test_the_calls(path: NoisePath, times: tuple[float, ...]) -> None:
    first, second = ScaleWise(times, (2, 1)).states(Half(path), Z, None, DRAWS)
    assert (first.xt.shape, second.xt.shape) == ((5, 1, 4, 4), (5, 1, 8, 8))
    sigma = float(path.sigma(torch.tensor(times[0])))
    torch.testing.assert_close(first.xt, sigma * 2 * reduced(Z, 2))
    eps = DRAWS.normal("eps1", (1, 8, 8), F64)
    t = torch.tensor(times[1], dtype=F64)
    torch.testing.assert_close(second.xt, perturb(path, enlarged(first.xt / 2, 2), eps, t))
    torch.testing.assert_close(second.xs, second.xt / 2)
    assert (float(second.t[0]), float(second.s[0])) == (times[1], 0)


def test_of_one_size_it_is_few_step() -> None:
    times = (2.5, 1.0, 0.3)
    found = ScaleWise(times, (1, 1, 1))(Half(), Z, None, DRAWS)
    assert torch.equal(found, FewStep(times=times)(Half(), Z, None, DRAWS))


def test_only_the_last_call_has_a_gradient() -> None:
    z = Z.clone().requires_grad_()
    state = ScaleWise().state(2, Half(), z, None, DRAWS)
    assert state.x0.shape == Z.shape
    assert not state.xt.requires_grad


def test_its_course() -> None:
    found = course(ScaleWise((2.5, 1.0, 0.4), (4, 2, 1)), VE())
    assert found.times == pytest.approx([2.5, 1.0, 0.4])
    assert (found.start, found.noises) == (2.5, 2)


@pytest.mark.parametrize(
    ("times", "scales", "message"),
    [
        ((1.0, 2.0), (2, 1), r"times decrease to a positive one; got \(1.0, 2.0\)"),
        ((1.0, 0.0), (2, 1), "times decrease to a positive one"),
        ((2.0, 1.0), (2,), "as many as its times, and end with 1"),
        ((2.0, 1.0), (4, 2), "as many as its times, and end with 1"),
        ((3.0, 2.0, 1.0), (3, 2, 1), "a multiple of the next"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    times: tuple[float, ...], scales: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleWise(times, scales)


def test_calls_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="renoises with fresh noise: pass draws"):
        ScaleWise()(Half(), Z)
    for path, times in ((Flow(), (2.5, 1.0)), (VP(), (999.0, 499.5))):
        with pytest.raises(ValueError, match="does not fit the times"):
            ScaleWise(times)(Half(path), Z, None, DRAWS)
