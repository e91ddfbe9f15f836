"""Exact mixtures against what they claim: posterior means, scores, densities, flows, samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.derivative import jvp
from fewstep.diffusion.noise_path import (
    VE,
    VP,
    Bridge,
    Flow,
    NoisePath,
    TrigFlow,
    perturb,
    x0_to_velocity,
)
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.gaussians import GaussianFlowMap
from tests.instances import PATHS, TEACHERS

F64 = torch.float64


def times(path: NoisePath) -> list[float]:
    top = min(path.t_max, 700.0 if isinstance(path, VP) else 3.0)
    return [0.15 * top, 0.5 * top, 0.9 * top]


def points(count: int = 9) -> Tensor:
    return 1.5 * torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(2))


def plane(half: float = 7.0, count: int = 401) -> tuple[Tensor, float]:
    """A grid on the plane and the area of its cells."""
    axis = torch.linspace(-half, half, count, dtype=F64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return grid, float(axis[1] - axis[0]) ** 2


def density(teacher: GaussianMixture, x0: Tensor) -> Tensor:
    """The data's density, from torch's own distributions."""
    basis = teacher.basis
    covs = basis @ torch.diag_embed(teacher.variances) @ basis.mT
    normal = torch.distributions.MultivariateNormal(teacher.means, covs)
    return (normal.log_prob(x0[:, None]) + teacher.log_weights).logsumexp(1).exp()


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", TEACHERS)
def test_denoiser_is_the_posterior_mean(name: str, path: NoisePath) -> None:
    """E[x_0 | x_t] and p_t(x_t) by summing over a grid of x_0, to 1e-9."""
    teacher, xt = TEACHERS[name](path), points()
    x0, cell = plane()
    prior = density(teacher, x0)
    for t in times(path):
        at = torch.tensor(t, dtype=F64)
        alpha, sigma = path.alpha(at), path.sigma(at)
        square = ((xt[:, None] - alpha * x0) ** 2).sum(-1)
        likelihood = (-square / (2 * sigma**2)).exp() / (2 * math.pi * sigma**2)
        joint = likelihood * prior * cell
        evidence = joint.sum(1)
        close: dict[str, float] = {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(teacher.log_prob(xt, at).exp(), evidence, **close)
        mean = joint @ x0 / evidence[:, None]
        torch.testing.assert_close(teacher(xt, at), mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("labelled", [False, True])
def test_score_is_the_gradient_of_the_log_density(
    name: str, path: NoisePath, labelled: bool
) -> None:
    teacher, xt = TEACHERS[name](path), points().requires_grad_()
    cond = torch.arange(len(xt)) % (len(teacher.means) + 1) if labelled else None
    for t in times(path):
        at = torch.tensor(t, dtype=F64)
        (gradient,) = torch.autograd.grad(teacher.log_prob(xt, at, cond).sum(), xt)
        torch.testing.assert_close(teacher.score(xt, at, cond), gradient, rtol=1e-9, atol=1e-9)
        spread = teacher.score(xt, at.expand(len(xt)), cond)
        torch.testing.assert_close(spread, gradient, rtol=1e-9, atol=1e-9)


def test_labels_choose_a_component_and_the_null_label_none() -> None:
    teacher, xt = TEACHERS["mixture"](VE()), points(4)
    t = torch.tensor([0.3, 0.6, 1.0, 2.0], dtype=F64)
    covs = teacher.basis @ torch.diag_embed(teacher.variances) @ teacher.basis.mT
    found = teacher(xt, t, torch.tensor([2, 0, 1, 3]))
    for row, label in enumerate((2, 0, 1)):
        alone = Gaussian(teacher.means[label], covs[label])
        torch.testing.assert_close(found[row], alone(xt, t)[row], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], teacher(xt, t)[3], rtol=1e-12, atol=1e-12)
    assert (found[:3] - teacher(xt, t)[:3]).abs().min() > 1e-3


def test_gaussian_denoiser_by_hand() -> None:
    """mean 1, variance 4, at sigma = 1 and x_t = 6: 1 + 4/5 (6 - 1); flow halves alpha."""
    one = torch.tensor(1.0, dtype=F64)
    x = torch.tensor([[6.0]], dtype=F64)
    mean = torch.tensor([1.0], dtype=F64)
    assert Gaussian(mean, 4.0)(x, one).item() == pytest.approx(5.0)
    # Flow at t = 1/2: alpha = sigma = 1/2, variance 1.25, gain 0.5 * 4 / 1.25
    found = Gaussian(mean, 4.0, Flow())(x, one / 2)
    assert found.item() == pytest.approx(1 + 1.6 * (6 - 0.5))


FLOWS = [(VE(), 3.0, 0.1), (Flow(), 0.95, 0.1), (TrigFlow(), 1.4, 0.1)]


@pytest.mark.parametrize(
    ("name", "path", "t", "s"),
    [*(("gaussian", *flow) for flow in FLOWS), *(("mixture", *flow) for flow in FLOWS[::2])],
    ids=repr,
)
def test_flow_map_solves_the_probability_flow(
    name: str, path: NoisePath, t: float, s: float
) -> None:
    """d Phi(x, t, s)/ds is the velocity at Phi; central differences, errors below 1e-6."""
    teacher, xt, h = TEACHERS[name](path), points(), 1e-3
    x = teacher.flow(xt, t, s)
    ahead, behind = teacher.flow(xt, t, s + h), teacher.flow(xt, t, s - h)
    at = torch.tensor(s, dtype=F64)
    velocity = x0_to_velocity(path, x, teacher(x, at), at)
    torch.testing.assert_close((ahead - behind) / (2 * h), velocity, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(teacher.flow(xt, t, t), xt, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(teacher.flow(x, s, t), xt, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path", "t", "s"),
    [*(("gaussian", *flow) for flow in FLOWS), ("mixture", *FLOWS[1])],
    ids=repr,
)
def test_flow_map_transports_the_density(name: str, path: NoisePath, t: float, s: float) -> None:
    """p_t(x) = p_s(Phi(x)) |det dPhi/dx|, the Jacobian by autograd."""
    teacher, xt = TEACHERS[name](path), points(4)
    mapped = teacher.flow(xt, t, s)
    flow = torch.func.jacrev(lambda x: teacher.flow(x[None], t, s)[0])
    jacobian: Any = torch.func.vmap(flow)(xt)
    at_t, at_s = torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64)
    moved = teacher.log_prob(mapped, at_s) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(moved, teacher.log_prob(xt, at_t), rtol=1e-5, atol=1e-5)


def moments(path: NoisePath, count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, u, s), s < u < t, from everywhere on a path, none at a kink of one."""
    top = min(path.t_max, 8.0 if path.t_max < 100 else 900.0)
    generator = torch.Generator().manual_seed(3)
    share = torch.rand(3, count, dtype=F64, generator=generator).sort(0, descending=True)[0]
    t, u, s = path.t_min + (top - path.t_min) * share * 0.999
    xt = perturb(path, points(count), torch.randn(count, 2, dtype=F64, generator=generator), t)
    return xt, t, u, s


@pytest.mark.parametrize("path", [p for p in PATHS if not isinstance(p, Bridge)], ids=repr)
def test_the_flow_of_a_mixture_from_pure_noise_to_the_data(path: NoisePath) -> None:
    """Two equal components are one Gaussian, whose flow is known; there and back, at the ends."""
    setting: Any = ([0.4, -0.7], [0.5, 0.3])
    one = Gaussian(*map(torch.tensor, setting), path).double()
    two = GaussianMixture([setting[0]] * 2, [setting[1]] * 2, [0.5, 0.5], path).double()
    top = path.t_max
    end = 0.0 if not isinstance(path, VE) else path.t_min
    x = two.flow(top * points() if isinstance(path, VE) else points(), top, end)
    expected = one.flow(top * points() if isinstance(path, VE) else points(), top, end)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two.flow(x, end, top), one.flow(x, end, top), rtol=1e-4, atol=1e-5)


def gaussian_flow_map(path: NoisePath) -> GaussianFlowMap:
    teacher = TEACHERS["gaussian"](path)
    assert isinstance(teacher, Gaussian)
    return GaussianFlowMap(teacher)


NEAR: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_exact_flow_map(path: NoisePath) -> None:
    """The closed form in the jump of `path.ddim`; jumps compose; at s = t, g is the denoiser."""
    net = gaussian_flow_map(path)
    xt, t, u, s = moments(path)
    moved = [net.teacher.flow(xt, float(a), float(b)) for a, b in zip(t, s, strict=True)]
    exact = torch.stack([x[i] for i, x in enumerate(moved)])
    torch.testing.assert_close(net.jump(xt, t, s), exact, **NEAR)
    torch.testing.assert_close(net.jump(net.jump(xt, t, u), u, s), exact, **NEAR)
    torch.testing.assert_close(net.jump(exact, s, t), xt, **NEAR)
    torch.testing.assert_close(net.jump(xt, t, t), xt, **NEAR)
    denoised = net.teacher(xt, t)
    torch.testing.assert_close(net(xt, t, s=t), denoised, **NEAR)
    torch.testing.assert_close(net(xt, t), denoised, **NEAR)
    assert float((net(xt, t, s=s) - denoised).abs().max()) > 1e-2
    one = net(xt[:1], t[0], s=s[0])
    torch.testing.assert_close(one, net(xt, t, s=s)[:1], **NEAR)


@pytest.mark.parametrize("path", [Flow(), TrigFlow()], ids=repr)
def test_the_exact_flow_map_from_noise_to_data(path: NoisePath) -> None:
    """alpha_t = 0 and sigma_s = 0: from the prior to N(mu, cov), x_0 = mu + cov^(1/2) x_t."""
    net = gaussian_flow_map(path)
    xt, ends = points(), torch.tensor([path.t_max, 0.0], dtype=F64)
    mu, lam, basis = (x[0] for x in net.parts())
    expected = mu + (xt @ basis * lam.sqrt()) @ basis.T
    torch.testing.assert_close(net.jump(xt, ends[0], ends[1]), expected, **NEAR)
    torch.testing.assert_close(net(xt, ends[0], s=ends[1]), expected, **NEAR)


def residuals(net: GaussianFlowMap, xt: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Lagrangian dX/ds - v(X, s) and Eulerian dX/dt + v(x_t, t) . grad X."""
    path, teacher = net.path, net.teacher
    x, by_s = jvp(lambda s: net.jump(xt, t, s), [s], [1.0])
    v = x0_to_velocity(path, xt, teacher(xt, t), t)
    _, by_t = jvp(lambda x, t: net.jump(x, t, s), [xt, t], [v, 1.0])
    return by_s - x0_to_velocity(path, x, teacher(x, s), s), by_t


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_exact_flow_map_in_its_derivatives(path: NoisePath) -> None:
    """Both residuals are zero; those of the denoiser, which jumps straight, are not."""
    net = gaussian_flow_map(path)
    xt, t, _, s = moments(path)
    for residual in residuals(net, xt, t, s):
        torch.testing.assert_close(residual, torch.zeros_like(xt), **NEAR)
    straight = gaussian_flow_map(path)
    straight.forward = lambda xt, t, cond=None, *, s=None: net(xt, t)  # type: ignore[method-assign]
    for residual in residuals(straight, xt, t, s):
        assert float(residual.abs().max()) > 1e-5


def test_sample_moments() -> None:
    """Means and second moments of 2e5 samples, within four standard errors; labels obeyed."""
    teacher, count = TEACHERS["mixture"](VE()), 200_000
    generator = torch.Generator().manual_seed(4)
    x, p = teacher.sample(count, generator), teacher.log_weights.exp()
    covs = teacher.basis @ torch.diag_embed(teacher.variances) @ teacher.basis.mT
    mean = p @ teacher.means
    outer = teacher.means[:, :, None] * teacher.means[:, None]
    second = (p[:, None, None] * (covs + outer)).sum(0)
    products = x[:, :, None] * x[:, None]
    for values, expected in ((x, mean), (products, second)):
        error = values.std(0) / math.sqrt(count)
        assert ((values.mean(0) - expected).abs() <= 4 * error).all()
    labelled = teacher.sample(count, generator, torch.full((count,), 2))
    error = labelled.std(0) / math.sqrt(count)
    assert ((labelled.mean(0) - teacher.means[2]).abs() <= 4 * error).all()
    torch.testing.assert_close(labelled.T.cov(), covs[2], rtol=2e-2, atol=2e-3)


def test_ring() -> None:
    ring = GaussianMixture.ring(4, 2.0, 0.1)
    expected = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]])
    torch.testing.assert_close(ring.means, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ring.variances, torch.full((4, 2), 0.01))
    torch.testing.assert_close(ring.log_weights.exp(), torch.full((4,), 0.25))


def test_impossible_mixtures_are_refused() -> None:
    means = [[0.0, 0.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match=r"means must be \(K, D\), got shape \(2,\)"):
        GaussianMixture(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"covs \(3, 2, 2\) do not fit means \(2, 2\)"):
        GaussianMixture(means, torch.ones(3, 2))
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        GaussianMixture(means, 1.0, [1.0, 0.0])
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture(means, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
