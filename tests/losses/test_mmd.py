"""The discrepancy of patches, against its closed form for Gaussian tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.losses.mmd import linear_mmd, rbf_mmd, tokens

F64 = torch.float64
SHIFT = torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=F64)
WIDTH, V1, V2 = 1.3, 0.6, 1.1
"""Tokens N(0, 0.6) and N(SHIFT, 1.1) of four numbers, twelve in a sample."""


def normal(count: int, variance: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return math.sqrt(variance) * torch.randn(count, 12, 4, generator=generator, dtype=F64)


def expected(variance: float, square: float) -> float:
    """E k(a, b) of a - b of that variance, and of a mean of that square."""
    whole = WIDTH**2 + variance
    return (WIDTH**2 / whole) ** 2 * math.exp(-square / (2 * whole))


GOLDEN = expected(2 * V1, 0) + expected(2 * V2, 0) - 2 * expected(V1 + V2, float(SHIFT @ SHIFT))


def test_the_mean_is_the_closed_form() -> None:
    """Within four standard errors; with tokens compared with themselves it is three times that."""
    assert pytest.approx(0.061437, abs=5e-7) == GOLDEN
    a, b = normal(5000, V1, 0), SHIFT + normal(5000, V2, 1)
    found = rbf_mmd(a, b, WIDTH)
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(GOLDEN, abs=4 * error)
    assert error < 0.02 * GOLDEN
    itself = sum((1 - expected(2 * v, 0)) / 12 for v in (V1, V2))
    assert GOLDEN + itself == pytest.approx(0.184, abs=0.001)
    assert itself > 100 * error


def test_equal_laws_have_none() -> None:
    found = rbf_mmd(normal(5000, V1, 2), normal(5000, V1, 3), WIDTH)
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(len(found))


def test_the_kernel_by_hand() -> None:
    """Two tokens each, of one number: three distances."""
    a, b = torch.tensor([[[0.0], [1.0]]], dtype=F64), torch.tensor([[[0.0], [3.0]]], dtype=F64)
    k = {d: math.exp(-(d**2) / (2 * WIDTH**2)) for d in (0, 1, 2, 3)}
    by_hand = k[1] + k[3] - 2 * (k[0] + k[3] + k[1] + k[2]) / 4
    assert float(rbf_mmd(a, b, WIDTH)) == pytest.approx(by_hand, rel=1e-12)


def test_gradients_are_finite_where_tokens_meet() -> None:
    a = torch.ones(1, 3, 2, dtype=F64, requires_grad=True)
    for loss in (rbf_mmd(a, torch.ones_like(a), 1.0), linear_mmd(a, torch.ones_like(a))):
        (found,) = torch.autograd.grad(loss.sum(), a)
        assert torch.equal(found, torch.zeros_like(a))


def test_the_linear_kernel_sees_means_alone() -> None:
    """Golden by hand; a law of another spread has no distance, which the other kernel sees."""
    a = torch.tensor([[[1.0, -1.0], [3.0, -1.0]]], dtype=F64)
    b = torch.zeros_like(a)
    by_hand = (math.sqrt(4.25) - 0.5 + math.sqrt(1.25) - 0.5) / 2
    assert float(linear_mmd(a, b, 0.5)) == pytest.approx(by_hand, rel=1e-12)
    wide, narrow = torch.tensor([[[-2.0], [2.0]]], dtype=F64), torch.zeros(1, 2, 1, dtype=F64)
    assert float(linear_mmd(wide, narrow)) == 0
    assert float(rbf_mmd(wide, narrow, 1.0)) > 0.1


def test_tokens_of_features() -> None:
    features = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert torch.equal(tokens(features)[0, 1], features[0, :, 0, 1])
    assert tokens(features).shape == (1, 4, 3)
    assert tokens(torch.ones(2, 5)).shape == (2, 1, 5)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="there is one only"):
        rbf_mmd(torch.ones(2, 1, 3), torch.ones(2, 1, 3), 1.0)
    with pytest.raises(ValueError, match=r"b has shape \(2, 1, 3\) but a has shape"):
        linear_mmd(torch.ones(2, 2, 3), torch.ones(2, 1, 3))
