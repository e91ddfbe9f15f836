"""What a discriminator at its optimum tells the generator, by quadrature in one dimension.

Data N(1, 0.25), the student x = a + b z at a = 0.2, b = 0.8, both with noise of size s. On a grid
of x_t everything is an integral: the discriminator's stationarity, and the generator's gradient,
where dx_t/da = 1 and E[z | x_t] = b (x_t - a) / (b^2 + s^2).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.losses.adversarial import LOSSES, GradientPenalty

F64 = torch.float64
MU, V, A, B = 1.0, 0.25, 0.2, 0.8
X = torch.linspace(-20, 20, 801, dtype=F64)
STEP = 40 / 800


def gaussian(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    v = torch.as_tensor(variance, dtype=F64)
    return (-((x - mean) ** 2) / (2 * v) - (2 * torch.pi * v).log() / 2).exp()


def densities(s: float, a: Tensor | float = A, b: Tensor | float = B) -> tuple[Tensor, Tensor]:
    """(q, p) of the noised data and samples on the grid."""
    return gaussian(X, MU, V + s * s), gaussian(X, a, b * b + s * s)


def log_ratio(x: Tensor, s: float) -> Tensor:
    vp, vq = B * B + s * s, V + s * s
    half = torch.tensor(vp / vq, dtype=F64).log() / 2
    return -((x - MU) ** 2) / (2 * vq) + (x - A) ** 2 / (2 * vp) + half


OPTIMUM: dict[str, Callable[[Tensor], Tensor]] = {
    "nonsaturating": lambda r: r.log(),
    "least_squares": lambda r: (r - 1) / (r + 1),
    "relativistic": lambda r: r.log() + 3.0,
}
each_loss = pytest.mark.parametrize("name", OPTIMUM)


def h(name: str, s: float) -> Tensor:
    """The table's h on the grid."""
    r = log_ratio(X, s).exp()
    if name == "relativistic":
        q, logit = densities(s)[0], log_ratio(X, s)
        return (q * (logit[None] - logit[:, None]).sigmoid()).sum(1) * STEP
    return 1 / (1 + r) if name == "nonsaturating" else 2 * r / (1 + r) ** 3


def weighted(h: Tensor, s: float) -> Tensor:
    """E_p h (s_p - s_q) (1, E[z | x_t])."""
    _, p = densities(s)
    vp, vq = B * B + s * s, V + s * s
    push = p * h * ((X - MU) / vq - (X - A) / vp)
    return torch.stack([push.sum(), (push * B * (X - A) / vp).sum()]) * STEP


def generator_gradient(name: str, s: float) -> Tensor:
    """d/d(a, b) of the generator's loss through x_t, the discriminator held at its optimum."""
    loss, (q, p) = LOSSES[name], densities(s)
    x = X.clone().requires_grad_()
    logit = OPTIMUM[name](log_ratio(x, s).exp())
    if loss.paired:
        margins = logit[:, None] - logit.detach()[None]
        each = loss.generator(margins.reshape(-1, 1)).reshape(margins.shape) @ q * STEP
    else:
        each = loss.generator(logit[:, None])
    (slope,) = torch.autograd.grad(each.sum(), x)
    z = B * (X - A) / (B * B + s * s)
    return torch.stack([(p * slope).sum(), (p * slope * z).sum()]) * STEP


def unrest(name: str, logit: Tensor, s: float) -> float:
    """The largest slope of the discriminator's loss in its logit at any x, over pairs of x."""
    loss, (q, p) = LOSSES[name], densities(s)
    real = logit[:, None].expand(-1, len(X)).clone().requires_grad_()
    fake = logit[None].expand(len(X), -1).clone().requires_grad_()
    each = loss.discriminator(real.reshape(-1, 1), fake.reshape(-1, 1)).reshape(real.shape)
    joint = (q[:, None] * p[None] * STEP * each).sum()
    of_real, of_fake = torch.autograd.grad(joint, [real, fake])
    return float((of_real.sum(1) + of_fake.sum(0)).abs().max())


@each_loss
def test_the_optimum_is_where_the_discriminator_rests(name: str) -> None:
    """And not beside it; of the relativistic loss, at any constant."""
    optimum = OPTIMUM[name](log_ratio(X, 0.5).exp())
    assert unrest(name, optimum, 0.5) < 1e-12
    assert unrest(name, log_ratio(X, 0.5).sigmoid(), 0.5) > 1e-2
    shifted = unrest(name, optimum + 0.5, 0.5)
    assert shifted < 1e-12 if name == "relativistic" else shifted > 1e-2


def test_hinge_rests_at_the_sign() -> None:
    """Pointwise, of seven answers; there the generator's loss has no slope almost everywhere."""
    q, p = densities(0.5)
    answers = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=F64)
    zero = torch.zeros(7, 1, dtype=F64)
    of_real = LOSSES["hinge"].discriminator(answers[:, None], zero)
    of_fake = LOSSES["hinge"].discriminator(zero, answers[:, None])
    best = answers[(q[:, None] * of_real + p[:, None] * of_fake).argmin(1)]
    inside = q + p > 1e-12
    assert torch.equal(best[inside], (q - p).sign()[inside])
    assert LOSSES["hinge"].log_ratio is None


@each_loss
@pytest.mark.parametrize("s", [0.5, 2.5])
def test_the_generator_follows_scores_weighted_by_h(name: str, s: float) -> None:
    """E_p h (s_p - s_q) dx_t; left out, or that of another loss, h shows."""
    found = generator_gradient(name, s)
    torch.testing.assert_close(found, weighted(h(name, s), s), rtol=1e-8, atol=1e-10)
    others = [torch.ones_like(X), *(h(other, s) for other in OPTIMUM if other != name)]
    for other in others:
        assert (weighted(other, s) - found).norm() > 1e-2 * found.norm()


def test_golden_gradients() -> None:
    """Recorded from an independent script, with finer grids and finite differences."""
    golden = {
        ("nonsaturating", 0.5): (-1.1566796, 0.7492063),
        ("least_squares", 0.5): (-0.3024243, 0.0653634),
        ("nonsaturating", 2.5): (-0.0647910, 0.0065978),
        ("least_squares", 2.5): (-0.0313422, 0.0028844),
    }
    for (name, s), expected in golden.items():
        assert generator_gradient(name, s).tolist() == pytest.approx(expected, rel=2e-5)
    ones = torch.ones_like(X)
    assert weighted(ones, 0.5).tolist() == pytest.approx((-1.6, 0.7011236), rel=1e-6)


def test_the_nonsaturating_divergence() -> None:
    """KL(p || q) - 2 JS, differentiated by autograd."""
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (A, B))
    q, p = (d.clamp_min(1e-290) for d in densities(0.5, a, b))
    m = (p + q) / 2
    jensen = (p * (p / m).log() + q * (q / m).log()).sum()
    total = ((p * (p / q).log()).sum() - jensen) * STEP
    expected = torch.stack(torch.autograd.grad(total, [a, b]))
    found = generator_gradient("nonsaturating", 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@each_loss
def test_logits_tell_the_density_ratio(name: str) -> None:
    """log r from the optimum; the relativistic one only once E_p r = 1 has been seen to."""
    _, p = densities(0.5)
    inside = p > 1e-6
    expected = log_ratio(X, 0.5)[inside]
    known = LOSSES[name].log_ratio
    assert known is not None
    found = known(OPTIMUM[name](log_ratio(X, 0.5).exp()))[inside]
    if name == "relativistic":
        mean = float((p[inside] * found.exp()).sum() * STEP)
        assert mean > 15
        found = found - torch.tensor(mean, dtype=F64).log()
    within = expected.abs() < 8
    torch.testing.assert_close(found[within], expected[within], rtol=1e-4, atol=1e-4)


H = torch.tensor([[1.0, 0.3, 0.0], [0.3, -0.5, 0.2], [0.0, 0.2, 0.8]], dtype=F64)


def quadratic(x: Tensor) -> Tensor:
    """Two logits (B, 2), whose mean is x H x / 2."""
    value = ((x @ H) * x).sum(1, keepdim=True) / 2
    return torch.cat([value - 1, value + 1], 1)


def nodes() -> tuple[Tensor, Tensor]:
    """Noise (n, 3) and weights (n,): quadrature for three normal numbers, exact to degree 5."""
    line = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=F64)
    mass = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=F64)
    noise = torch.cartesian_prod(line, line, line)
    return noise, torch.cartesian_prod(mass, mass, mass).prod(1)


@pytest.mark.parametrize("s", [0.01, 0.1])
def test_noise_finds_the_gradient_penalty(s: float) -> None:
    """On a quadratic: |H x|^2 + s^2 / 4 (2 tr H^2 + tr^2 H), and at s = 0.01 the exact one."""
    noise, mass = nodes()
    xt = torch.tensor([[0.7, -1.1, 0.4]], dtype=F64).expand(len(noise), 3).clone()
    xt.requires_grad_()
    exact = GradientPenalty()(quadratic, xt, quadratic(xt), noise)
    slope = H @ xt[0].detach()
    torch.testing.assert_close(exact, (slope @ slope).expand(len(noise)))
    found = (mass * GradientPenalty(step=s)(quadratic, xt, quadratic(xt), noise)).sum()
    more = s**2 / 4 * (2 * (H @ H).trace() + H.trace() ** 2)
    torch.testing.assert_close(found, slope @ slope + more, rtol=1e-9, atol=0)
    if s == 0.01:
        assert float(found.detach()) == pytest.approx(float(exact[0].detach()), rel=2e-4)


def test_control_noise_on_the_clean_sample() -> None:
    """Compared with the logit at x_t it is 289 times the penalty: two pictures differ."""
    noise, mass = nodes()
    first, second = noise.repeat_interleave(27, 0), noise.repeat(27, 1)
    both = mass.repeat_interleave(27) * mass.repeat(27)
    clean = torch.tensor([[0.7, -1.1, 0.4]], dtype=F64).expand(len(both), 3)
    xt = clean + 2.0 * first
    penalty = GradientPenalty(step=0.1)
    right = (both * penalty(quadratic, xt, quadratic(xt), second)).sum()
    wrong = (both * penalty(quadratic, clean, quadratic(xt), second)).sum()
    assert float(wrong / right) == pytest.approx(288.83, rel=1e-4)


def test_penalties_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"r1, r2 and step are 0 or more, got 0, -1 and 0"):
        GradientPenalty(r2=-1.0)
