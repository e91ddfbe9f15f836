"""Moments, kernel distance and inception score: closed forms, and exact expectations."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from fewstep.eval import neighbours
from fewstep.eval.frechet import STRIP, FeatureMoments, MomentSum, frechet_distance, moments
from fewstep.eval.metrics import ClassProbabilities, inception_score, kid, precision_recall

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_come_in_batches(offset: float) -> None:
    """Whatever the batches; far from zero too, where sums of squares lose ten digits."""
    x = normal(500, 4) @ normal(4, 4, seed=1) + offset
    gather = MomentSum()
    for part in (x[:1], x[1:33], x[33:400], x[400:]):
        gather.add(part)
    found = gather.moments()
    assert gather.count == 500
    torch.testing.assert_close(found.mu, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sigma, torch.cov(x.T), rtol=1e-8, atol=1e-8)
    naive = (x.T @ x - 500 * torch.outer(x.mean(0), x.mean(0))) / 499
    assert torch.allclose(naive, torch.cov(x.T), rtol=1e-8, atol=1e-8) == (offset == 0)


def test_moments_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        moments(torch.ones(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.tensor([[1.0], [math.nan]]))
    a = moments(normal(5, 2))
    with pytest.raises(ValueError, match="dimension 2 and 3 have no distance"):
        frechet_distance(a, moments(normal(5, 3)))


def test_the_distance_of_gaussians_with_common_axes() -> None:
    """|d|^2 + sum (sqrt a - sqrt b)^2 along the axes, whichever way these are turned."""
    turn = torch.linalg.qr(normal(3, 3)).Q
    a, b = torch.tensor([4.0, 1.0, 0.0], dtype=F64), torch.tensor([1.0, 9.0, 2.0], dtype=F64)
    one = FeatureMoments(torch.zeros(3, dtype=F64), turn @ a.diag() @ turn.T)
    two = FeatureMoments(turn @ torch.tensor([1.0, 2.0, 2.0], dtype=F64), turn @ b.diag() @ turn.T)
    assert frechet_distance(one, two) == pytest.approx(9 + 1 + 4 + 2, rel=1e-12)
    assert frechet_distance(two, one) == pytest.approx(16, rel=1e-12)


@pytest.mark.parametrize("power", [0, 3, 6])
def test_the_distance_is_that_of_the_product(power: int) -> None:
    """Of covariances whose eigenvalues span so many powers of ten, on axes of their own.

    Against the roots of the eigenvalues of S_a S_b, which keep six digits of the distance.
    """
    scale = torch.logspace(0, -power / 2, 40, dtype=F64)
    a, b = (moments(normal(300, 40, seed=s) * scale @ normal(40, 40, seed=9)) for s in (1, 2))
    root = torch.linalg.eigvals(a.sigma @ b.sigma).real.clamp_min(0).sqrt().sum()
    expected = (a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_small_axes_are_not_lost() -> None:
    """400 axes of 1e-17 beside one of 1: (1e-8.5)^2 each way, far below what a product keeps."""
    a = torch.full((401,), 1e-17, dtype=F64)
    a[0] = 1.0
    one = FeatureMoments(torch.zeros(401, dtype=F64), a.diag())
    two = FeatureMoments(torch.zeros(401, dtype=F64), a.flip(0).diag())
    assert frechet_distance(one, two) == pytest.approx(2.0, rel=1e-6)
    assert frechet_distance(one, one) < 1e-12


def test_a_covariance_that_is_not_finite_has_no_distance() -> None:
    broken = FeatureMoments(torch.zeros(2), torch.full((2, 2), math.inf))
    assert math.isnan(frechet_distance(broken, broken))


@pytest.mark.parametrize("dim", [STRIP - 1, STRIP, 2 * STRIP + 3])
def test_moments_in_strips_are_whole(dim: int) -> None:
    x = normal(40, dim)
    found = moments(x).sigma
    torch.testing.assert_close(found, torch.cov(x.T), rtol=1e-10, atol=1e-12)
    assert torch.equal(found, found.T)


def test_the_kernel_distance_in_strips() -> None:
    """Of more points than one strip has, against the whole matrices of kernels."""
    x, y = normal(STRIP + 44, 3), normal(STRIP + 44, 3, seed=1)
    n = len(x)
    xx, yy, xy = ((p @ q.T / 3 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    off = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    assert kid(x, y) == pytest.approx(float(off - 2 * xy.mean()), rel=1e-12)


def kernel(x: Tensor, y: Tensor) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def test_the_distance_of_fewer_samples_than_dimensions() -> None:
    """Singular covariances: the root's trace is a nuclear norm; equal sets are at 0, no less."""
    draws = torch.Generator().manual_seed(0)
    for n, m, dim in ((20, 30, 64), (5, 5, 128)):
        a = torch.randn(n, dim, generator=draws, dtype=torch.float64)
        b = 0.1 + torch.randn(m, dim, generator=draws, dtype=torch.float64)
        x, y = ((s - s.mean(0)) / math.sqrt(len(s) - 1) for s in (a, b))
        nuclear = torch.linalg.svdvals(x @ y.T).sum()
        gap = (a.mean(0) - b.mean(0)).square().sum()
        expected = float(gap + x.square().sum() + y.square().sum() - 2 * nuclear)
        found = frechet_distance(moments(a), moments(b))
        assert found == pytest.approx(expected, rel=1e-6)
        assert 0 <= frechet_distance(moments(a), moments(a)) < 1e-5
    broken = FeatureMoments(torch.full((dim,), math.nan), torch.eye(dim))
    assert math.isnan(frechet_distance(broken, broken))


def test_the_kernel_distance_has_no_bias() -> None:
    """Its mean over all sets of three from two distributions on two points is the exact one.

    With the pairs of a point with itself it would be far above.
    """
    points = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=F64)
    p, q = (0.3, 0.7), (0.6, 0.4)
    table = [[kernel(x, y) for y in points] for x in points]
    exact = sum(
        (p[i] - q[i]) * (p[j] - q[j]) * table[i][j] for i, j in product(range(2), repeat=2)
    )
    mean = with_diagonal = 0.0
    for a, b in product(product(range(2), repeat=3), repeat=2):
        chance = math.prod(p[i] for i in a) * math.prod(q[i] for i in b)
        mean += chance * kid(points[list(a)], points[list(b)])
        xx, yy, xy = (
            sum(table[i][j] for i, j in product(*pair)) / 9 for pair in ((a, a), (b, b), (a, b))
        )
        with_diagonal += chance * (xx + yy - 2 * xy)
    assert mean == pytest.approx(exact, rel=1e-12)
    assert with_diagonal > exact + 0.5


def test_the_kernel_distance_of_subsets() -> None:
    """Zero within 4 errors for sets of one distribution, sign and all; fixed by the seed."""
    found = torch.tensor(
        [kid(normal(200, 4, seed=s), normal(200, 4, seed=100 + s)) for s in range(40)]
    )
    error = float(found.std()) / math.sqrt(40)
    assert abs(float(found.mean())) < 4 * error
    assert (found < 0).any()
    a, b = normal(900, 4), normal(700, 4, seed=1) + 0.3
    whole = kid(a[:700], b, size=700)
    parts = kid(a, b, subsets=20, size=200)
    assert parts == kid(a, b, subsets=20, size=200) != kid(a, b, subsets=20, size=200, seed=1)
    assert parts == pytest.approx(whole, rel=0.3)
    assert whole > 20 * error
    with pytest.raises(ValueError, match="at least two points"):
        kid(a[:1], b)


def test_the_inception_score_of_known_predictions() -> None:
    """One-hot over K classes: K. Uniform, or all alike: 1. A share p of two: 2 / e^H(p)."""
    certain = torch.eye(5, dtype=F64).repeat(4, 1) * 1e4
    assert ClassProbabilities.of(certain).score() == pytest.approx(5, rel=1e-12)
    assert ClassProbabilities.of(torch.zeros(7, 5)).score() == pytest.approx(1, rel=1e-12)
    assert ClassProbabilities.of(certain[:1].expand(6, -1)).score() == pytest.approx(1, rel=1e-12)
    p = 0.9
    logits = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=F64).log().repeat(3, 1)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    expected = 2 / math.exp(entropy)
    assert ClassProbabilities.of(logits + 3).score() == pytest.approx(expected, rel=1e-12)
    skew = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=F64) * 1e4  # one class never seen
    shares = torch.cat([skew, torch.full((4, 1), -1e9, dtype=F64), 1e4 - skew], 1)
    quarter = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert ClassProbabilities.of(shares).score() == pytest.approx(quarter, rel=1e-12)


def test_the_inception_score_of_parts() -> None:
    """Ten parts score lower than one of all, and sum to it."""
    logits = 2 * normal(1000, 20)
    parts = [ClassProbabilities.of(part) for part in logits.split(100)]
    whole = sum(parts[1:], parts[0])
    once = ClassProbabilities.of(logits)
    assert whole.count == 1000
    assert whole.score() == pytest.approx(once.score(), rel=1e-12)
    mean, spread = inception_score(parts)
    assert mean < once.score()
    scores = torch.tensor([part.score() for part in parts], dtype=F64)
    assert mean == pytest.approx(float(scores.mean()), rel=1e-12)
    assert spread == pytest.approx(float(scores.std(correction=0)), rel=1e-12)
    assert inception_score([once]) == (once.score(), 0.0)


def test_precision_and_recall_do_not_know_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never hold more distances than a chunk has rows."""
    a, b = normal(150, 6), normal(120, 6, seed=1) + 0.5
    whole = precision_recall(a, b)
    assert 0.1 < whole[0] < 0.95
    assert whole[0] != whole[1]
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    assert precision_recall(a, b) == whole
    shapes = [part.shape for part in neighbours.within(a, b, torch.ones(120, dtype=F64))]
    assert {shape[0] for shape in shapes} == {7, 3}
