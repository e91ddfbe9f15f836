"""Paths and conversions: definitions, derivatives, round trips, published numbers, limits."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import noise_path
from fewstep.diffusion.noise_path import (
    VE,
    VP,
    Bridge,
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
    h = 3e-5 * t.clamp(max=1)
    x0, eps = normal(len(t), 4), normal(len(t), 4, seed=1)
    xt = perturb(path, x0, eps, t)
    ahead, behind = perturb(path, x0, eps, t + h), perturb(path, x0, eps, t - h)
    difference = (ahead - behind) / (2 * h)[:, None]
    velocity = x0_to_velocity(path, xt, x0, t)
    torch.testing.assert_close(velocity, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_deterministic_step(path: NoisePath) -> None:
    """With the true x_0, x_s holds the noise of x_t; back again is x_t; s = t moves nothing."""
    t = inner_times(path)
    s = t.flip(0) / 2
    x0, eps, other = (normal(len(t), 3, seed=i) for i in range(3))
    xt, xs = perturb(path, x0, eps, t), perturb(path, x0, eps, s)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(path.ddim(xt, x0, t, s), xs, **close)
    torch.testing.assert_close(path.ddim(path.ddim(xt, other, t, s), other, s, t), xt, **close)
    assert torch.equal(path.ddim(xt, other, t, t), xt)
    assert (path.ddim(xt, other, t, s) - xs).abs().max() > 1e-2
    torch.testing.assert_close(path.heun(xs, x0, x0, t, s), xs, rtol=0, atol=0)
    single = path.ddim(xt, x0, t[3], s[3])  # times () are the same as (B,) filled with them
    full = torch.ones_like(t)
    torch.testing.assert_close(single, path.ddim(xt, x0, t[3] * full, s[3] * full))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_second_order_step_is_the_trapezoid_rule(path: NoisePath) -> None:
    """In y = x / c and tau = sigma / c, c = alpha + b sigma: dy/dtau = eps - b x_0."""
    b = 0 if isinstance(path, VE) else 1
    t = inner_times(path)
    s = t * 0.6
    (alpha, sigma), (alpha_s, sigma_s) = (
        (path.alpha(u)[:, None], path.sigma(u)[:, None]) for u in (t, s)
    )
    c, c_s = alpha + b * sigma, alpha_s + b * sigma_s
    xt, x0, later = (normal(len(t), 2, seed=i) for i in range(3))
    eps = (xt - alpha * x0) / sigma
    euler = c_s * (xt / c + (sigma_s / c_s - sigma / c) * (eps - b * x0))
    xs = path.ddim(xt, x0, t, s)
    torch.testing.assert_close(xs, euler, rtol=1e-8, atol=1e-8)
    mean = (eps - b * x0 + (xs - alpha_s * later) / sigma_s - b * later) / 2
    expected = c_s * (xt / c + (sigma_s / c_s - sigma / c) * mean)
    found = path.heun(xs, x0, later, t, s)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert (found - xs).abs().max() > 1e-3


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_noising_on_keeps_the_law(path: NoisePath) -> None:
    """Mean and variance of x_t given x_0, as if noised at once; two bridges are one."""
    t = inner_times(path)
    s, u = t * 0.3, t * 0.7
    x0, one, two = (normal(len(t), 3, seed=i) for i in range(3))
    zero = torch.zeros_like(x0)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    mean = path.bridge(perturb(path, x0, zero, s), zero, s, t)
    torch.testing.assert_close(mean, alpha * x0, rtol=1e-9, atol=1e-9)
    old = path.bridge(perturb(path, zero, one, s), zero, s, t) / one
    new = path.bridge(zero, two, s, t) / two
    torch.testing.assert_close(old**2 + new**2, sigma.expand_as(old) ** 2, rtol=1e-9, atol=1e-12)
    assert (new > 0).all()
    twice = [path.bridge(path.bridge(zero, two, s, u), zero, u, t) / two]
    twice += [path.bridge(zero, two, u, t) / two]
    torch.testing.assert_close(twice[0] ** 2 + twice[1] ** 2, new**2, rtol=1e-9, atol=1e-12)
    assert torch.equal(path.bridge(x0, two, t, t), x0)
    with pytest.raises(ValueError, match="noise is added from s to a later t, got t < s"):
        path.bridge(x0, one, t, s)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_steps_are_finite_at_both_ends(path: NoisePath, dtype: torch.dtype) -> None:
    """From pure noise, and to clean data, where alpha or sigma is zero; and their gradients."""
    top, bottom = (torch.full((2,), v, dtype=dtype) for v in (path.t_max, 0.0))
    middle, x, x0 = bottom.lerp(top, 0.4), normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype)
    for t, s in ((top, middle), (middle, bottom), (top, bottom), (bottom, bottom), (top, top)):
        leaf = x0.clone().requires_grad_()
        found = path.ddim(x, leaf, t, s)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
        assert path.bridge(x, x0, s, t).isfinite().all()
    if not isinstance(path, VP):
        torch.testing.assert_close(path.ddim(x, x0, middle, bottom), x0)
    torch.testing.assert_close(path.bridge(x, x0, top, top), x)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_first_call_may_be_within_a_transform(path: NoisePath) -> None:
    """jvp, vmap and grad of a path that was made just now, outside and inside; then once more."""
    t = inner_times(path)
    one = torch.ones_like(t)
    for _ in range(2):
        new = replace(path)  # type: ignore[type-var]
        for _ in range(2):
            first = torch.func.jvp(new.sigma, (t,), (one,))[1]
            inside = torch.func.jvp(lambda t: replace(path).sigma(t), (t,), (one,))[1]  # type: ignore[type-var]
            mapped = torch.func.vmap(torch.func.grad(new.sigma))(t)
            torch.testing.assert_close(first, inside, rtol=0, atol=0)
            torch.testing.assert_close(first, mapped)
            torch.testing.assert_close(first, rates(new, t)[3], rtol=0, atol=0)
    assert torch.equal(deepcopy(new).alpha(t), path.alpha(t))
    assert (new, hash(new), repr(new)) == (path, hash(path), repr(path))


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


PRESERVING = [p for p in PATHS if not isinstance(p, VE | Flow | Bridge)]


@pytest.mark.parametrize("path", PRESERVING, ids=repr)
def test_variance_is_preserved(path: NoisePath) -> None:
    t = inner_times(path)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_a_bridge_by_hand() -> None:
    """Variance s (1 - t) of what a Brownian bridge adds; its noise level found back; its ends."""
    path, t = Bridge(0.5), torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=F64)
    assert path.sigma(t).tolist() == pytest.approx([0, 0.2, 0.25, 0])
    assert path.alpha(t).tolist() == pytest.approx([1, 0.8, 0.5, 0])
    inner = t[1:3]
    torch.testing.assert_close(path.time_of(path.flow_time(inner)), inner)
    # From data and the state at t to s: mean and variance of a Brownian bridge between them.
    x0, xt, eps = (normal(2, 1, seed=i) for i in range(3))
    later, s = inner * 0 + 0.5, inner * 0 + 0.2
    found = path.ancestral(xt, x0, eps, later, s)
    mean = 0.6 * x0 + 0.4 * xt
    torch.testing.assert_close(found, mean + 0.5 * math.sqrt(0.2 * 0.3 / 0.5) * eps)
    with pytest.raises(ValueError, match=r"Bridge.std is positive and finite, got 0"):
        Bridge(0.0)


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
    for betas in ((0.1, 1.0), (0.0, 0.0), (0.1, 1.5), (0.1, math.nan)):
        with pytest.raises(ValueError, match="VP needs betas between 0 and 1, got VP"):
            VP(betas=betas)
    with pytest.raises(ValueError, match="VP needs betas between 0 and 1"):
        VP(-0.1, 0.1)


def test_an_accelerator_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where s is beyond t samples are NaN there; the others of the batch are as ever."""
    path, (xs, eps) = VE(), torch.randn(2, 3, 4, dtype=F64)
    low, high = torch.tensor([1.0, 1.0, 3.0], dtype=F64), torch.tensor([2.0, 1.0, 2.0], dtype=F64)
    there, back = (
        path.bridge(xs[:2], eps[:2], low[:2], high[:2]),
        path.ancestral(xs[:2], eps[:2], eps[:2], high[:2], low[:2]),
    )
    monkeypatch.setattr(noise_path, "HOSTS", frozenset())
    noisier, cleaner = path.bridge(xs, eps, low, high), path.ancestral(xs, eps, eps, high, low)
    assert torch.equal(noisier[:2], there)
    assert torch.equal(cleaner[:2], back)
    assert noisier[2].isnan().all()
    assert cleaner[2].isnan().all()
