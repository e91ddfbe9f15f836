"""Power-function averages against quadrature, closed forms, and ema-pytorch."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from ema_pytorch.post_hoc_ema import KarrasEMA, sigma_rel_to_gamma, solve_weights
from torch import Tensor, nn

from fewstep.distillation.method import Nets
from fewstep.runs.averages import Averages, even, reconstruct
from fewstep.storage.files import Damaged
from fewstep.training.loop import State
from fewstep.training.power_ema import (
    PowerEMA,
    beta,
    combination,
    gamma_of,
    overlap,
    sigma_rel_of,
    update,
)

LENGTHS = (0.01, 0.05, 0.1, 0.13, 0.2, 0.28)


def profile(gamma: float, t: float, tau: np.ndarray) -> np.ndarray:
    """Equation 1."""
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)


def integral(values: np.ndarray, grid: np.ndarray) -> float:
    """Simpson's rule on an even grid with an odd number of points."""
    weights = np.full(len(grid), 2.0)
    weights[1::2], weights[[0, -1]] = 4, 1
    return float(weights @ values * (grid[1] - grid[0]) / 3)


@pytest.mark.parametrize("sigma", LENGTHS)
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma: float) -> None:
    gamma, grid = gamma_of(sigma), np.linspace(0, 3, 20_001)
    p = profile(gamma, 3, grid)
    assert abs(integral(p, grid) - 1) < 1e-5
    mean = integral(p * grid, grid)
    deviation = math.sqrt(integral(p * (grid - mean) ** 2, grid))
    assert abs(deviation / 3 / sigma - 1) < 1e-5
    assert abs(sigma_rel_of(gamma) / sigma - 1) < 1e-12


def test_the_lengths_of_edm2() -> None:
    """Section 3.1: 0.05 and 0.10 are gamma 16.97 and 6.94; a plain mean is 12^(-1/2)."""
    assert round(gamma_of(0.05), 2) == 16.97
    assert round(gamma_of(0.10), 2) == 6.94
    assert sigma_rel_of(0) == pytest.approx(12**-0.5, rel=1e-15)
    for sigma in (0.0, -0.1, 12**-0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"sigma_rel is between 0 and 0\.2887, got"):
            gamma_of(sigma)
    with pytest.raises(ValueError, match="lengths that differ"):
        PowerEMA((0.1, 0.1))


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.4), (0.3, 0.35)])
def test_overlaps_by_quadrature(t: float, s: float) -> None:
    """Both sides end at the smaller time, where the product has a jump."""
    grid = np.linspace(0, min(t, s), 40_001)
    for a in (0.2, 2.0, 6.94, 16.97):
        for b in (0.5, 6.94, 30.0):
            wanted = integral(profile(a, t, grid) * profile(b, s, grid), grid)
            assert float(overlap(*np.array([a, t, b, s]))) == pytest.approx(wanted, rel=2e-5)


def path(steps: int, size: int = 5) -> Tensor:
    """Weights that wander: (steps, size), float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    return 3 + noise.cumsum(0) / math.sqrt(steps)


def test_the_recursion_is_the_integral_of_steps() -> None:
    """Equation 2 gives theta_k the weight (k^(gamma + 1) - (k - 1)^(gamma + 1)) / n^(gamma + 1).

    That is equation 1 for weights that are constant between updates; updates of unequal steps
    in time too.
    """
    gamma, theta = gamma_of(0.1), path(60)
    times = torch.arange(1, 61, dtype=torch.float64)
    for stamps in (times, times * 128, times.square()):
        net, average = (nn.ParameterList([nn.Parameter(torch.zeros(5).double())]) for _ in "ab")
        last = 0.0
        for k, now in enumerate(stamps.tolist()):
            net[0].data.copy_(theta[k])
            update(average, net, beta(gamma, now, now - last))
            last = now
        edges = torch.cat([torch.zeros(1).double(), stamps / stamps[-1]]) ** (gamma + 1)
        wanted = edges.diff() @ theta
        torch.testing.assert_close(average[0].data, wanted, rtol=1e-12, atol=0)
        assert not torch.allclose(average[0].data, theta.mean(0), rtol=1e-2)


def stored(count: int, end: float) -> tuple[list[float], list[float]]:
    """gammas and times of `count` even snapshots of the two averages of EDM2."""
    times = [end * (i + 1) / count for i in range(count)] * 2
    return [gamma_of(s) for s in (0.05, 0.10) for _ in range(count)], times


@pytest.mark.parametrize("sigma", [0.03, 0.07, 0.13, 0.2])
def test_combinations_are_those_of_ema_pytorch(sigma: float) -> None:
    """Its solution of the same normal equations, to 1e-6 of the largest coefficient."""
    gammas, times = stored(16, 1600.0)
    x, mismatch = combination(gammas, times, gamma_of(sigma), 1600.0)
    arrays = (torch.tensor(v).double() for v in (times, gammas, [1600.0], [gamma_of(sigma)]))
    other = solve_weights(*arrays)[:, 0]
    other = other / other.sum()  # which it leaves to its caller, who does not
    assert float((x - other).abs().max() / other.abs().max()) < 1e-6
    assert gamma_of(sigma) == pytest.approx(sigma_rel_to_gamma(sigma), rel=1e-12)
    grid = np.linspace(0, 1600, 64_001)  # every snapshot on the grid
    fit = sum(c * profile(g, t, grid) for c, g, t in zip(x.tolist(), gammas, times, strict=True))
    wanted = profile(gamma_of(sigma), 1600, grid)
    off = integral((fit - wanted) ** 2, grid) / integral(wanted**2, grid)
    assert mismatch == pytest.approx(math.sqrt(off), rel=0.02)


def published(gammas: list[float], times: list[float], gamma: float, end: float) -> np.ndarray:
    """Algorithm 3 in long form: one integral at a time, Gauss's elimination, the sum."""

    def inner(a: float, t: float, b: float, s: float) -> float:
        size = (t / s) ** b if t < s else (t / s) ** -a
        return (a + 1) * (b + 1) * size / ((a + b + 1) * max(t, s))

    pairs = list(zip(gammas, times, strict=True))
    stored = np.array([[inner(*p, *q) for q in pairs] for p in pairs])
    x = np.linalg.solve(stored, np.array([inner(*p, gamma, end) for p in pairs]))
    return np.asarray(x / x.sum())


@pytest.mark.parametrize("lengths", [(0.05, 0.1), (0.05,), (0.03, 0.2)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 50])
@pytest.mark.parametrize("uneven", [False, True])
def test_few_or_many_snapshots_give_the_published_solution(
    lengths: tuple[float, ...], count: int, uneven: bool
) -> None:
    """To 1e-9 of the largest; what never changed comes back to 1e-12, at every length."""
    times = [1600.0 * ((i + 1) / count) ** (1.5 if uneven else 1) for i in range(count)]
    gammas = [gamma_of(s) for s in lengths for _ in times]
    for sigma in (0.005, 0.03, 0.1, 0.13, 0.25, 0.288):
        x, mismatch = combination(gammas, times * len(lengths), gamma_of(sigma), 1600.0)
        wanted = published(gammas, times * len(lengths), gamma_of(sigma), 1600.0)
        assert np.abs(x.numpy() - wanted).max() < 1e-9 * max(1, np.abs(wanted).max())
        assert abs(float(x.sum()) - 1) < 1e-12
        assert abs(sum(x.tolist()) - 1) < 1e-12
        assert mismatch > 1e-3 or sigma in lengths or count > 5


def test_profiles_that_are_alike_or_the_same_are_one() -> None:
    """The system has no one solution then; coefficients stay moderate, the profile is the same."""
    gammas, times = stored(4, 100.0)
    x, mismatch = combination(gammas, times, gamma_of(0.13), 100.0)
    close = [g * (1 + 1e-9) for g in gammas]
    for more in (gammas, close):
        y, other = combination([*gammas, *more], times * 2, gamma_of(0.13), 100.0)
        assert float(y.abs().max()) < 2 * float(x.abs().max())
        assert other == pytest.approx(mismatch, rel=1e-5)
        assert abs(float(y.sum()) - 1) < 1e-12
        torch.testing.assert_close(y[:8] + y[8:], x, rtol=1e-5, atol=1e-7)
    for args in (([], [], 3.0, 1.0), ([3.0], [2.0], 3.0, 1.0), ([3.0], [0.0], 3.0, 1.0)):
        with pytest.raises(ValueError, match="profiles to combine end between 0 and 1, got times"):
            combination(*args)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_weights_that_never_changed_come_back(tmp_path: Path, steps: int) -> None:
    """Parameters and buffers, from few snapshots, at each length; and the sentence about it."""
    net = nn.BatchNorm1d(3).double()
    for number, tensor in enumerate(net.state_dict().values()):
        tensor.fill_(1 + number)
    state = State(Nets({"student": net}), deepcopy(net))
    kept = Averages(PowerEMA((0.05, 0.1)), tmp_path, state, "student")
    for step in range(1, steps + 1):
        state.step, state.images = step, step * 64
        kept.update(state)
        kept.save(state, regular=True)
    for sigma in (0.01, 0.05, 0.13, 0.25):
        made = reconstruct(tmp_path, sigma)
        for name, tensor in net.state_dict().items():
            assert float((made.weights[name] - tensor).abs().max()) < 1e-12, name
        assert made.lengths == (0.05, 0.1)
        assert made.steps == steps
        mismatch = even((0.05, 0.1), steps, sigma)
        assert made.facts["mismatch"] == pytest.approx(mismatch, rel=1e-9)
        said = f"the profile is met to {100 * mismatch:.2g} %"
        if mismatch > 0.05:
            many = int(made.sentence.partition(" steps meet")[0].rpartition("(")[2])
            reached = even((0.05, 0.1), many, sigma)
            assert many == 256 or even((0.05, 0.1), many // 2, sigma) > 0.05 >= reached
            both = " ".join(map(str, sorted({0.05, 0.1, sigma})))
            said += (
                f" only, from {steps} steps with averages of 0.05, 0.1: train with a smaller "
                f"--save-every ({many} steps meet it to {100 * reached:.2g} %), or keep this "
                f"length itself (--power.sigma-rel {both})"
            )
        assert made.sentence == said
    assert "only" in reconstruct(tmp_path, 0.25).sentence or steps > 14


def test_averages_are_those_of_ema_pytorch() -> None:
    """It starts from the first weights and counts updates from there, one ahead of the paper."""
    theta = path(40).float()
    net = nn.Linear(5, 1, bias=False)
    net.weight.data.copy_(theta[0])
    other = KarrasEMA(net, sigma_rel=0.1, update_every=1)
    ours = deepcopy(net)
    for k in range(40):
        net.weight.data.copy_(theta[k])
        other.update()
        update(ours, net, beta(gamma_of(0.1), k + 2))
    torch.testing.assert_close(ours.weight, other.ema_model.weight, rtol=1e-6, atol=1e-7)
    update(ours, net, 0.9)
    assert not torch.allclose(ours.weight, other.ema_model.weight, rtol=1e-4, atol=0)


def test_an_average_that_was_not_kept_is_reconstructed(tmp_path: Path) -> None:
    """0.05 and 0.10 are stored twenty times; 0.07 and 0.13 are also tracked, for comparison.

    With p the wanted profile, q the combination, and theta(tau) the weights,

        |error| <= |p - q| (integral |theta - c|^2)^(1/2) + |integral q - 1| |c|

    by Cauchy and Schwarz for every c: no error beyond the one of the profiles. The error is also
    less than a hundredth of the distance between the stored averages; their mean is no answer.
    """
    steps, batch, theta = 400, 64, path(400).float()
    net = nn.Linear(5, 1, bias=False)
    net.register_buffer("count", torch.tensor(0))
    state = State(Nets({"student": net}), deepcopy(net))
    kept = Averages(PowerEMA((0.05, 0.10)), tmp_path / "kept", state, "student")
    tracked = Averages(PowerEMA((0.07, 0.13)), tmp_path / "tracked", state, "student")
    for k in range(steps):
        net.weight.data.copy_(theta[k])
        net.count += 1
        state.step, state.images = state.step + 1, state.images + batch
        for averages in (kept, tracked):
            averages.update(state)
        tracked.update(state)  # nothing new: nothing changes
        if state.step % 20 == 0:
            kept.save(state, regular=True)
    spread = float((kept.nets[0.05].weight - kept.nets[0.10].weight).norm())
    gammas, times = stored(20, float(steps * batch))
    for sigma, exact in tracked.nets.items():
        made = reconstruct(tmp_path / "kept", sigma)
        assert made.facts["images"] == steps * batch
        assert int(made.weights["count"]) == steps
        error = float((made.weights["weight"] - exact.weight).norm())
        gamma, end = gamma_of(sigma), float(steps * batch)
        x, mismatch = combination(gammas, times, gamma, end)
        assert made.facts["mismatch"] == pytest.approx(mismatch, rel=1e-6)
        norm = (gamma + 1) / math.sqrt((2 * gamma + 1) * end)
        centre = theta[-100:].mean(0)
        far = math.sqrt(float((theta - centre).square().sum()) * batch)
        bound = mismatch * norm * far + abs(float(x.sum()) - 1) * float(centre.norm())
        assert error < bound + 1e-5
        assert error < 0.01 * spread
        wrong = kept.nets[0.05].weight.lerp(kept.nets[0.10].weight, 0.5)
        assert float((wrong - exact.weight).norm()) > bound


def test_what_is_stored_is_exact_and_checked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 1)
    state = State(Nets({"student": net}), deepcopy(net))
    kept = Averages(PowerEMA((0.05, 0.10)), tmp_path, state, "student")
    for step in range(1, 9):
        net.weight.data.add_(torch.randn(1, 5))
        state.step, state.images = step, step * 10
        kept.update(state)
        kept.save(state, regular=step % 3 == 0)
    names = [p.name for p in sorted(tmp_path.iterdir())]
    assert names == ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]
    again = Averages(PowerEMA((0.05, 0.10)), tmp_path, state, "student")
    for sigma, average in again.nets.items():
        assert torch.equal(average.weight, kept.nets[sigma].weight)
        assert not torch.equal(average.weight, net.weight)
    exact = reconstruct(tmp_path, 0.05)  # at step 6: a stored one, met exactly
    before = Averages(
        PowerEMA((0.05,)), tmp_path, State(state.nets, net, step=6, images=60), "student"
    )
    torch.testing.assert_close(exact.weights["weight"], before.nets[0.05].weight)
    assert exact.facts == {"sigma_rel": 0.05, "images": 60, "mismatch": pytest.approx(0, abs=1e-6)}
    file = tmp_path / "step-00000008" / "sigma-0.1.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="SHA-256"):
        Averages(PowerEMA((0.05, 0.10)), tmp_path, state, "student")
    with pytest.raises(Damaged, match="step-00000009"):
        Averages(PowerEMA((0.05,)), tmp_path, State(state.nets, net, step=9), "student")
    assert Averages(PowerEMA(), tmp_path / "x", state, "student").nets == {}
