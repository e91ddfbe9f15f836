"""Paths and conversions: definitions, derivatives, round trips, published numbers, limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.path import (
    VE,
    VP,
    Flow,
    NoisePath,
    TrigFlow,
    eps_to_x0,
    expand,
    perturb,
    rates,
    same_shape,
    v_to_x0,
    velocity_to_x0,
    x0_to_eps,
    x0_to_score,
    x0_to_v,
    x0_to_velocity,
)
from tests.instances import PATHS

F64 = torch.float64
CONVERSIONS = {
    "velocity": (x0_to_velocity, velocity_to_x0),
    "eps": (x0_to_eps, eps_to_x0),
    "v": (x0_to_v, v_to_x0),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def inner_times(path: NoisePath, count: int = 7) -> Tensor:
    """Times strictly inside the path, off the knots of a discrete one."""
    low = max(path.t_min, 0.01)
    u = torch.linspace(0.03, 0.97, count, dtype=F64)
    return low + u * (min(path.t_max, 1e3) - low)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_round_trip(path: NoisePath, name: str) -> None:
    forward, back = CONVERSIONS[name]
    t = inner_times(path)
    x0, eps = normal(len(t), 3, 2), normal(len(t), 3, 2, seed=1)
    xt = perturb(path, x0, eps, t)
    prediction = forward(path, xt, x0, t)
    torch.testing.assert_close(back(path, xt, prediction, t), x0, rtol=1e-8, atol=1e-8)
    single = forward(path, xt, x0, t[2])  # t: () is the same as t: (B,) filled with it
    torch.testing.assert_close(single, forward(path, xt, x0, t[2].expand(len(t))))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_predictions_are_what_they_are_called(path: NoisePath) -> None:
    """From the true x_0: eps, v = alpha eps - sigma x_0, and score = -eps/sigma at x_0's law."""
    t = inner_times(path)
    x0, eps = normal(len(t), 4), normal(len(t), 4, seed=1)
    xt = perturb(path, x0, eps, t)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(xt, alpha * x0 + sigma * eps, rtol=0, atol=0)
    torch.testing.assert_close(x0_to_eps(path, xt, x0, t), eps, **close)
    torch.testing.assert_close(x0_to_v(path, xt, x0, t), alpha * eps - sigma * x0, **close)
    torch.testing.assert_close(x0_to_score(path, xt, x0, t), -eps / sigma, **close)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_is_the_time_derivative(path: NoisePath) -> None:
    """Against central differences of alpha_t x_0 + sigma_t eps, whose error is below 1e-6."""
    t = inner_times(path)
    h = 1e-4 * t.clamp(max=1)
    x0, eps = normal(len(t), 4), normal(len(t), 4, seed=1)
    xt = perturb(path, x0, eps, t)
    ahead, behind = perturb(path, x0, eps, t + h), perturb(path, x0, eps, t - h)
    difference = (ahead - behind) / (2 * h)[:, None]
    velocity = x0_to_velocity(path, xt, x0, t)
    torch.testing.assert_close(velocity, difference, rtol=1e-6, atol=1e-6)


def test_rates_by_hand() -> None:
    t = torch.tensor([0.2, 0.7], dtype=F64)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    by_hand = {
        VE(): (one, t, zero, one),
        Flow(): (1 - t, t, -one, one),
        TrigFlow(): (t.cos(), t.sin(), -t.sin(), t.cos()),
    }
    for path, expected in by_hand.items():
        torch.testing.assert_close(rates(path, t), expected)


@pytest.mark.parametrize("path", [Flow(), TrigFlow()], ids=repr)
def test_pure_noise_is_finite_and_exact(path: NoisePath) -> None:
    """At alpha = 0, x_t is eps; predictions of x_0 there are -v, and eps - v for flow."""
    t = torch.full((2,), path.t_max, dtype=F64)
    eps, x0 = normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(perturb(path, x0, eps, t), eps)
    at = {"rtol": 1e-12, "atol": 1e-12}
    flow = eps - x0 if isinstance(path, Flow) else -x0
    torch.testing.assert_close(x0_to_velocity(path, eps, x0, t), flow, **at)
    torch.testing.assert_close(velocity_to_x0(path, eps, flow, t), x0, **at)
    torch.testing.assert_close(x0_to_v(path, eps, x0, t), -x0, **at)
    torch.testing.assert_close(v_to_x0(path, eps, -x0, t), x0, **at)
    torch.testing.assert_close(x0_to_eps(path, eps, x0, t), eps, **at)
    torch.testing.assert_close(x0_to_score(path, eps, x0, t), -eps, **at)


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow()], ids=repr)
def test_clean_data_is_exact(path: NoisePath) -> None:
    """At sigma = 0, x_t is x_0 whatever the network says."""
    t, x0 = torch.zeros(2, dtype=F64), normal(2, 3)
    assert torch.equal(velocity_to_x0(path, x0, normal(2, 3, seed=5), t), x0)
    assert torch.equal(v_to_x0(path, x0, normal(2, 3, seed=5), t), x0)


@pytest.mark.parametrize(
    ("path", "t", "ratio", "tolerance"),
    [
        (VP(), 625, 2.5017, 5e-5),
        (VP(), 20, 0.138, 5e-4),
        (VP(), 980, 13.04, 5e-3),
        (VP(), 999, 14.61, 5e-3),
        (VP(1e-4, 0.02, schedule="linear"), 440, 2.5, 1e-2),
        (VP(1e-4, 0.02, schedule="linear"), 999, 157.4, 5e-2),
    ],
)
def test_vp_noise_levels_of_published_schedules(
    path: VP, t: int, ratio: float, tolerance: float
) -> None:
    """sigma/alpha of Stable Diffusion's and PixArt's betas at whole timesteps."""
    at = torch.tensor(float(t), dtype=F64)
    assert float(path.sigma(at) / path.alpha(at)) == pytest.approx(ratio, abs=tolerance)


def test_vp_by_hand() -> None:
    """Betas (0.1, 0.5): abar = 0.9, 0.45; halfway the odds are the geometric mean."""
    path = VP(betas=(0.1, 0.5))
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    odds = math.sqrt(9 * 0.45 / 0.55)
    abar = torch.tensor([0.9, odds / (1 + odds), 0.45], dtype=F64)
    torch.testing.assert_close(path.alpha(t), abar.sqrt())
    torch.testing.assert_close(path.sigma(t), (1 - abar).sqrt())
    assert (path.t_min, path.t_max) == (0.0, 1.0)
    assert (VP().t_min, VP().t_max) == (0.0, 999.0)


@pytest.mark.parametrize("path", [p for p in PATHS if not isinstance(p, VE | Flow)], ids=repr)
def test_variance_is_preserved(path: NoisePath) -> None:
    t = inner_times(path)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_noise_grows_with_time_and_labels_are_of_order_one(path: NoisePath) -> None:
    t = torch.linspace(path.t_min, path.t_max, 101, dtype=F64)
    ratio = path.sigma(t) / path.alpha(t).clamp_min(1e-12)
    assert (ratio.diff() > 0).all()
    label = path.label(t)
    assert (label.diff() > 0).all()
    assert label.abs().max() <= 2


def test_labels_by_hand() -> None:
    t = torch.tensor([0.5], dtype=F64)
    assert VE().label(t).item() == pytest.approx(math.log(0.5) / 4)
    assert Flow().label(t).item() == 0.5
    assert VP().label(t).item() == pytest.approx(0.5 / 999)


def test_shape_errors_name_both_sides() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"t has batch 3 but x has batch 4; expected t: \(B,\)"):
        expand(torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"t has shape \(4, 1\) but x has batch 4"):
        expand(torch.zeros(4, 1), x)
    with pytest.raises(ValueError, match=r"eps has shape \(4, 1\) but x0 has shape \(4, 2\)"):
        perturb(VE(), x, torch.zeros(4, 1), torch.ones(4))
    with pytest.raises(ValueError, match=r"b has shape \(2,\) but a has shape \(4, 2\)"):
        same_shape(a=x, b=torch.zeros(2))
    for convert in (*CONVERSIONS["velocity"], *CONVERSIONS["eps"], *CONVERSIONS["v"], x0_to_score):
        with pytest.raises(ValueError, match=r"has shape \(3, 2\) but xt has shape \(4, 2\)"):
            convert(Flow(), x, torch.zeros(3, 2), torch.full((4,), 0.5))
    assert expand(torch.zeros(()), x).shape == ()
    assert expand(torch.zeros(4), torch.zeros(4, 3, 2)).shape == (4, 1, 1)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule is 'linear' or 'scaled_linear', got 'cosine'"):
        VP(schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two timesteps"):
        VP(betas=(0.1,))
    with pytest.raises(ValueError, match="at least two timesteps"):
        VP(steps=1)
