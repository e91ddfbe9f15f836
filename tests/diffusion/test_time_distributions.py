"""Time laws: each quantile function is the inverse of the law's distribution function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.time_distributions import (
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
    NoiseLevels,
    OfLevel,
    Shifted,
    TimeLaw,
    Uniform,
    Whole,
)
from tests.instances import TIME_LAWS

F64 = torch.float64
GRID = torch.linspace(0.001, 0.999, 999, dtype=F64)


def gauss(x: Tensor) -> Tensor:
    """The standard normal's distribution function."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def karras(law: Karras) -> Callable[[Tensor], Tensor]:
    def cdf(t: Tensor) -> Tensor:
        a, b = law.lo ** (1 / law.rho), law.hi ** (1 / law.rho)
        return (t ** (1 / law.rho) - a) / (b - a) * 1000 / law.tmax

    return cdf


def noise_levels(level: Tensor, lo: float, hi: float, rho: float) -> Tensor:
    if rho == math.inf:
        return (level / lo).log() / math.log(hi / lo)
    low, high = lo ** (1 / rho), hi ** (1 / rho)
    return (level ** (1 / rho) - low) / (high - low)


def level(path: NoisePath, t: Tensor) -> Tensor:
    return path.sigma(t) / path.alpha(t)


def level_ends(path: NoisePath) -> Tensor:
    return level(path, torch.tensor([path.t_min, path.t_max], dtype=F64))


def cdf(law: TimeLaw) -> Callable[[Tensor], Tensor]:
    """P(T <= t), written from the law's description."""
    match law:
        case LogNormal(mean, std):
            return lambda t: gauss((t.log() - mean) / std)
        case LogitNormal(mean, std):
            return lambda t: gauss(((t / (1 - t)).log() - mean) / std)
        case Uniform(lo, hi):
            return lambda t: (t - lo) / (hi - lo)
        case Karras():
            return karras(law)
        case Whole(lo, hi):
            return lambda t: (t.floor() - lo + 1) / (hi - lo + 1)
        case Shifted(shift, lo):
            return lambda t: (t / (shift * (1 - t) + t) - lo) / (1 - lo)
        case Discrete(values):
            return lambda t: (torch.tensor(values) <= t[:, None] + 1e-9).double().mean(1)
        case NoiseLevels(path, lo, hi, rho):
            return lambda t: noise_levels(path.sigma(t) / path.alpha(t), lo, hi, rho)
        case OfLevel(LogNormal(mean, std), path):
            low, high = (gauss((x.log() - mean) / std) for x in level_ends(path))
            return lambda t: (gauss((level(path, t).log() - mean) / std) - low) / (high - low)
    raise NotImplementedError(f"give {law} a distribution function here")


@pytest.mark.parametrize("law", TIME_LAWS, ids=repr)
def test_quantile_is_monotone_and_inverts_the_distribution_function(law: TimeLaw) -> None:
    t = law.quantile(GRID)
    back = cdf(law)(t)
    if isinstance(law, Discrete | Whole):  # the smallest t with P(T <= t) >= u
        count = len(law.values) if isinstance(law, Discrete) else law.hi - law.lo + 1
        assert (t.diff() >= 0).all()
        assert ((back >= GRID) & (back - 1 / count <= GRID)).all()
    else:
        assert (t.diff() > 0).all()
        torch.testing.assert_close(back, GRID, rtol=0, atol=1e-12)


def test_published_ladder() -> None:
    """SiD's clock: sigma(0.5) = 2.515; tmax = 800 ends the ladder at 24.41."""
    u = torch.tensor([0.0, 0.5, 0.8, 1.0], dtype=F64)
    whole = Karras().quantile(u).tolist()
    assert whole == pytest.approx([0.002, 2.515, 24.41, 80.0], rel=2e-4)
    assert Karras(tmax=800.0).quantile(u[-1]).item() == pytest.approx(24.41, abs=5e-3)
    assert Karras(tmax=800.0).quantile(u[0]).item() == pytest.approx(0.002)


def test_medians() -> None:
    half = torch.tensor(0.5, dtype=F64)
    assert LogNormal().quantile(half).item() == pytest.approx(math.exp(-1.2))
    assert LogitNormal().quantile(half).item() == pytest.approx(0.5)
    assert Uniform(2, 5).quantile(half).item() == 3.5


def test_whole() -> None:
    """Each of the numbers has the same share, its ends included."""
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-7, 1.0], dtype=F64)
    assert Whole(3, 6).quantile(u).tolist() == [3, 3, 4, 5, 6, 6, 6]
    with pytest.raises(ValueError, match="needs lo < hi"):
        Whole(6, 6)


def test_discrete() -> None:
    law = Discrete((1.0, 2.0, 10.0))
    u = torch.tensor([1e-7, 0.333, 0.334, 0.666, 0.667, 1 - 1e-7, 1.0], dtype=F64)
    assert law.quantile(u).tolist() == [1, 1, 2, 2, 10, 10, 10]
    with pytest.raises(ValueError, match="increasing"):
        Discrete((2.0, 1.0))
    with pytest.raises(ValueError, match="not empty"):
        Discrete(())


@pytest.mark.parametrize("law", TIME_LAWS, ids=repr)
def test_within_is_the_law_between_two_times(law: TimeLaw) -> None:
    """Its distribution function is (F(t) - F(low)) / (F(high) - F(low))."""
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    low, high = (law.quantile(torch.full_like(u, end)) for end in (0.2, 0.7))
    found = law.within(u, low, high)
    assert bool(((low <= found) & (found <= high)).all())
    assert bool((found.diff() >= 0).all())
    a, b = law.share(low), law.share(high)
    torch.testing.assert_close(found, law.quantile(a + u * (b - a)).clamp(low, high))
    if not isinstance(law, Discrete | Whole):
        torch.testing.assert_close(law.share(found), 0.2 + 0.5 * u)


def test_within_by_hand() -> None:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    end = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    torch.testing.assert_close(Uniform().within(u, 0 * end, end), u * end)
    torch.testing.assert_close(Uniform().within(u, end, 0 * end + 1), end + (1 - end) * u)
    assert Uniform(2.0, 3.0).within(u, 0 * end, end).tolist() == end.tolist()  # no mass there
