"""Time laws: each quantile function is the inverse of the law's distribution function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.time_distributions import (
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
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
