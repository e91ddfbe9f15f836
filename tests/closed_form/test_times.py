"""Time laws: each quantile function is the inverse of the law's distribution function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.times import (
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
    Shifted,
    TimeLaw,
    Uniform,
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
        case Shifted(shift, lo):
            return lambda t: (t / (shift * (1 - t) + t) - lo) / (1 - lo)
        case Discrete(values):
            return lambda t: (torch.tensor(values) <= t[:, None] + 1e-9).double().mean(1)
    raise NotImplementedError(f"give {law} a distribution function here")


@pytest.mark.parametrize("law", TIME_LAWS, ids=repr)
def test_quantile_is_monotone_and_inverts_the_distribution_function(law: TimeLaw) -> None:
    t = law.quantile(GRID)
    back = cdf(law)(t)
    if isinstance(law, Discrete):  # the smallest t with P(T <= t) >= u
        assert (t.diff() >= 0).all()
        assert ((back >= GRID) & (back - 1 / len(law.values) <= GRID)).all()
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


def test_discrete() -> None:
    law = Discrete((1.0, 2.0, 10.0))
    u = torch.tensor([1e-7, 0.333, 0.334, 0.666, 0.667, 1 - 1e-7, 1.0], dtype=F64)
    assert law.quantile(u).tolist() == [1, 1, 2, 2, 10, 10, 10]
    with pytest.raises(ValueError, match="increasing"):
        Discrete((2.0, 1.0))
    with pytest.raises(ValueError, match="not empty"):
        Discrete(())
