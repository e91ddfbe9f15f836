"""Distances between sets: closed forms, sets made by hand, and impostors of real digits."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data import digits
from fewstep.domains.digits import Digits
from fewstep.eval import metrics, neighbours
from fewstep.eval.digit_features import features_and_labels
from fewstep.eval.domain_scores import SampleMetrics, evaluate, real_scores, score, summarise
from fewstep.eval.metric_table import metric
from fewstep.eval.metrics import (
    density_coverage,
    frechet,
    nearest,
    precision_recall,
    sliced_wasserstein,
)
from fewstep.eval.neighbours import Reference

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def column(*values: float) -> Tensor:
    """Points on a line."""
    return torch.tensor(values, dtype=F64)[:, None]


def rotation(dim: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def root(cov: Tensor) -> Tensor:
    """The symmetric square root."""
    values, basis = torch.linalg.eigh(cov)
    return basis * values.clamp_min(0).sqrt() @ basis.T


def frechet_of(m_a: Tensor, a: Tensor, m_b: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr (A^1/2 B A^1/2)^1/2: the symmetric way."""
    half = root(a)
    cross = root(half @ b @ half).trace()
    return float((m_a - m_b) @ (m_a - m_b) + a.trace() + b.trace() - 2 * cross)


def test_frechet_of_moved_and_stretched_copies_is_exact() -> None:
    """The moments of a copy are known: |d|^2 for a shift, (1 - c)^2 tr S for a stretch."""
    a, shift = normal(500, 4) @ normal(4, 4, seed=1), torch.tensor([0.5, -1.0, 2.0, 0.0])
    cov, mean = torch.cov(a.T), a.mean(0)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + shift) == pytest.approx(5.25, rel=1e-9)
    stretched = mean + 1.5 * (a - mean)
    assert frechet(a, stretched) == pytest.approx(0.25 * float(cov.trace()), rel=1e-9)
    assert frechet(a, 1.5 * a) == pytest.approx(0.25 * float(cov.trace() + mean @ mean), rel=1e-9)
    line = column(1.0, 3.0)  # variance 2, unbiased: (sqrt 8 - sqrt 2)^2 = 2 from twice itself
    assert frechet(line, 2 * line - 2) == pytest.approx(2.0, rel=1e-12)


def test_frechet_of_correlated_sets_is_the_symmetric_formula() -> None:
    a, b = normal(300, 5) @ normal(5, 5, seed=1), normal(200, 5, seed=2) @ normal(5, 5, seed=3) + 1
    exact = frechet_of(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet(a, b) == pytest.approx(exact, rel=1e-9)
    assert frechet(b, a) == pytest.approx(exact, rel=1e-9)
    turn = rotation(5)
    assert frechet(a @ turn, b @ turn) == pytest.approx(exact, rel=1e-9)
    assert frechet(a.flip(0), b) == pytest.approx(exact, rel=1e-9)
    assert frechet(a, b @ turn) != pytest.approx(exact, rel=1e-2)  # one turned alone is another


def test_frechet_survives_features_that_never_fire() -> None:
    a, b = normal(100, 3), normal(100, 3, seed=1)
    dead = torch.zeros(100, 2, dtype=F64)
    padded = frechet(torch.cat([a, dead], 1), torch.cat([b, dead], 1))
    assert padded == pytest.approx(frechet(a, b), abs=1e-6)


def test_frechet_of_two_gaussians_within_its_error_bar() -> None:
    """8 pairs of 20,000: within 4 standard errors, which are below 1 %; the bias is O(1e-4)."""
    a, b = normal(4, 4, seed=1) / 2, torch.diag(torch.tensor([1.0, 0.5, 0.2, 1.5], dtype=F64))
    mean = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=F64)
    zero = torch.zeros(4, dtype=F64)
    exact = frechet_of(zero, a.T @ a, mean, b.T @ b)
    runs = torch.tensor(
        [
            frechet(normal(20_000, 4, seed=10 + s) @ a, normal(20_000, 4, seed=30 + s) @ b + mean)
            for s in range(8)
        ]
    )
    error = float(runs.std()) / math.sqrt(8)
    assert error < 0.01 * exact
    assert abs(float(runs.mean()) - exact) < 4 * error


LINE = column(*range(10))
"""Each point reaches 2 to its third neighbour, 3 at both ends."""


def test_precision_and_recall_on_a_line() -> None:
    fake = column(-3.5, -3.0, 4.5, 11.0, 12.0, 13.0)  # the real union is [-3, 12]
    assert precision_recall(LINE, fake) == (4 / 6, 1.0)  # the outliers reach over everything
    crowd = column(0.0, 0.25, 0.5, 0.75)  # reaches [-0.75, 1.5]
    assert precision_recall(LINE, crowd) == (1.0, 2 / 10)
    assert precision_recall(crowd, LINE) == (2 / 10, 1.0)
    far = LINE + 100
    assert precision_recall(LINE, far) == (0.0, 0.0)
    assert precision_recall(LINE, LINE) == (1.0, 1.0)
    ends = column(-1.0, 10.0, 11.5, 12.5, 13.5)  # with k = 1, 2, 3, 4 the ends reach as far
    found = [precision_recall(LINE, ends, k)[0] for k in (1, 2, 3, 4)]
    assert found == [2 / 5, 2 / 5, 3 / 5, 4 / 5]


def test_precision_and_recall_tell_lost_modes_from_bad_pictures() -> None:
    one, two, junk = normal(200, 2), normal(200, 2, seed=1) + 50, normal(200, 2, seed=2) - 50
    again = one + 1e-3
    both = torch.cat([one, two])
    lost, bad = precision_recall(both, again), precision_recall(one, torch.cat([again, junk]))
    assert lost == (1.0, 0.5)
    assert bad == (0.5, 1.0)
    turn = rotation(2)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert precision_recall(3 * both[order] @ turn, 3 * again @ turn) == lost
    with pytest.raises(ValueError, match="precision and recall need more than k = 3 points"):
        precision_recall(one[:3], two)


def test_sliced_wasserstein_of_a_shift() -> None:
    """Along u every quantile moves by <u, d>: the root mean square over the sphere is |d|/sqrt D.

    <u, d>^2 D/|d|^2 has mean 1 and variance 2 (D - 1)/(D + 2); 20 x 256 directions, 4 errors.
    """
    a, d = normal(300, 3), torch.tensor([1.0, -2.0, 2.0])
    found = torch.tensor([sliced_wasserstein(a, a + d, seed=s) for s in range(20)])
    error = math.sqrt(2 * 2 / 5 / (20 * 256))
    assert abs(float((found**2).mean()) / 3 - 1) < 4 * error
    assert found.std() > 0  # seeds differ
    assert sliced_wasserstein(a, a + d) == sliced_wasserstein(a + d, a)
    assert sliced_wasserstein(a, a) == 0.0


def test_sliced_wasserstein_of_a_stretch() -> None:
    """Quantiles scale: distance(a, c a) = |c - 1| distance(a, 0), and that is sqrt(E|a|^2 / D)."""
    a = normal(2000, 3) * torch.tensor([1.0, 2.0, 0.5])
    size = sliced_wasserstein(a, torch.zeros(1, 3, dtype=F64))
    assert size == pytest.approx(math.sqrt(5.25 / 3), rel=0.08)  # 256 directions: 5 % each
    for c in (0.0, 0.5, 3.0):
        assert sliced_wasserstein(a, c * a) == pytest.approx(abs(c - 1) * size, rel=1e-6)
    assert sliced_wasserstein(a, a[torch.arange(2000).flip(0)]) == 0.0


def quantile_distance(a: list[float], b: list[float]) -> float:
    """The integral of (Q_a(u) - Q_b(u))^2 over u, by the point of every 1/(n m): no merging."""
    a, b = sorted(a), sorted(b)
    count = len(a) * len(b)
    pairs = ((a[k // len(b)], b[k // len(a)]) for k in range(count))
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in pairs) / count)


def heavy(count: int, seed: int) -> Tensor:
    """Cauchy."""
    return normal(count, 1, seed=seed) / normal(count, 1, seed=seed + 50)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (30, 30), (37, 20), (24, 36), (101, 7)])
def test_sliced_wasserstein_on_a_line_couples_quantiles_exactly(n: int, m: int) -> None:
    """Equal and unequal counts, heavy tails, duplicates, a large mean; the sign cancels."""
    for make in (lambda c, s: normal(c, 1, seed=s), heavy, lambda c, s: heavy(c, s).round()):
        for shift in (0.0, 1e4):
            a, b = make(n, 1) + shift, 2 * make(m, 2) + shift
            exact = quantile_distance(a[:, 0].tolist(), b[:, 0].tolist())
            assert sliced_wasserstein(a, b) == pytest.approx(exact, rel=1e-9)
            assert sliced_wasserstein(b, a) == pytest.approx(exact, rel=1e-9)
            both = torch.cat([a, a])  # each point twice is the same distribution
            assert sliced_wasserstein(both, b) == pytest.approx(exact, rel=1e-9)
    assert sliced_wasserstein(column(0.0), column(7.0)) == pytest.approx(7.0, rel=1e-12)


def test_sliced_wasserstein_in_the_plane_is_the_mean_of_its_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one block of directions or several."""
    a, b = torch.cat([heavy(40, 1), heavy(40, 3)], 1), normal(25, 2, seed=5)
    unit = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=F64)
    unit = unit / unit.norm(dim=0)
    squares = [quantile_distance((a @ u).tolist(), (b @ u).tolist()) ** 2 for u in unit.T]
    for block in (2, 32):
        monkeypatch.setattr(metrics, "BLOCK", block)
        found = sliced_wasserstein(a, b, 9, seed=3)
        assert found == pytest.approx(math.sqrt(sum(squares) / 9), rel=1e-9)


def all_pairs(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage pair by pair, in fractions: nothing is rounded."""
    r, f = ([[Fraction(v) for v in row] for row in x.double().tolist()] for x in (real, fake))

    def gap(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return sum(((x - y) ** 2 for x, y in zip(a, b, strict=True)), Fraction())

    def reach(x: list[list[Fraction]]) -> list[Fraction]:
        return [
            sorted(gap(a, b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)
        ]

    def hits(x: list[list[Fraction]], centres: list[list[Fraction]]) -> list[list[bool]]:
        radii = reach(centres)
        return [[gap(a, c) <= d for c, d in zip(centres, radii, strict=True)] for a in x]

    inside, back = hits(f, r), hits(r, f)
    return (
        sum(map(any, inside)) / len(f),
        sum(map(any, back)) / len(r),
        sum(map(sum, inside)) / (k * len(f)),
        sum(map(any, zip(*inside, strict=True))) / len(r),
    )


def whole(*shape: int, seed: int) -> Tensor:
    """Whole numbers of a small range: ties and copies everywhere."""
    return (2 * normal(*shape, seed=seed)).round()


HOSTILE: dict[str, Any] = {
    "plain": lambda s: normal(23, 4, seed=s),
    "float32": lambda s: normal(23, 4, seed=s).float(),
    "large mean": lambda s: (normal(23, 4, seed=s) + 1e4).float(),
    "larger mean, small scale": lambda s: normal(23, 4, seed=s) * 1e-3 + 1e9,
    "tiny": lambda s: normal(23, 4, seed=s) * 1e-180,
    "huge": lambda s: normal(23, 4, seed=s) * 1e180,
    "ties": lambda s: whole(23, 2, seed=s),
    "ties far away": lambda s: whole(23, 2, seed=s) + 2.0**40,
    "all one": lambda s: torch.full((23, 3), 1e4 + 1 / 3),
    "duplicates": lambda s: normal(6, 3, seed=s)[torch.arange(23) % 6] + 1e4,
    "copies": lambda s: torch.cat([normal(12, 3) + 1e4, normal(11, 3, seed=s) + 1e4]),
    "heavy tails": lambda s: torch.cat([heavy(23, s), heavy(23, s + 1) ** 3], 1),
    "two far outliers": lambda s: torch.cat(
        [normal(20, 2, seed=s), 1e9 + normal(3, 2, seed=s) * 1e-3]
    ),
    "one axis dominates": lambda s: normal(23, 2, seed=s) * torch.tensor([1e8, 1e-8]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("chunk", [5, 1024])
def test_neighbourhood_scores_are_those_of_all_pairs(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the mean, the scale and the ties; sets of different sizes."""
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    real, fake = HOSTILE[name](1), HOSTILE[name](2)[:17]
    for k in (1, 3, 5):
        found = (*precision_recall(real, fake, k), *density_coverage(real, fake, k))
        assert found == pytest.approx(all_pairs(real, fake, k), abs=1e-12), k
    assert (*precision_recall(real, real), density_coverage(real, real)[1]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_reference_is_looked_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its radii serve every set that it is compared with, of whatever scale."""
    real, fake = HOSTILE[name](1), HOSTILE[name](2)[:17]
    known, seen, found = Reference(real, (1, 99)), list[int](), neighbours.radii
    monkeypatch.setattr(neighbours, "radii", lambda x, *ks: seen.extend(ks) or found(x, *ks))
    for factor in (1.0, 3.0, 2.0**-10, 2.0**30):
        other = (fake.double() * factor).to(fake.dtype)
        scores = (*precision_recall(known, other), *density_coverage(known, other, 3))
        assert scores == pytest.approx(all_pairs(real, other, 3), abs=1e-12), factor
    scores = (*precision_recall(known, fake, 1), *density_coverage(known, fake, 1))
    assert scores == pytest.approx(all_pairs(real, fake, 1), abs=1e-12)
    assert seen == [3, 1]  # both at once, none of 99 others; those of the others are metrics' own
    constant, near = Reference(torch.ones(9, 2)), 1 + torch.zeros(9, 2).double()
    assert precision_recall(constant, near) == (1.0, 1.0)


def test_a_large_mean_changes_nothing() -> None:
    """In float32, 300 and 200 points of 64 features around 10,000, with differences by hand."""
    a, b = normal(300, 64, seed=1).float() + 1e4, (1.02 * normal(200, 64, seed=2)).float() + 1e4
    real, fake = a.double(), b.double()
    to_real, own = ((x[:, None] - real).norm(dim=2) for x in (fake, real))
    reach = own.kthvalue(4, dim=1).values
    expected = float((to_real <= reach).any(1).double().mean())
    assert 0.05 < expected < 0.95
    assert precision_recall(a, b)[0] == pytest.approx(expected, abs=1e-12)
    assert precision_recall(a, b) == precision_recall(real - 1e4, fake - 1e4)
    assert density_coverage(a, b) == density_coverage(real - 1e4, fake - 1e4)
    inside = torch.cdist(b, a) <= torch.cdist(a, a).kthvalue(4, dim=1).values
    assert abs(float(inside.any(1).double().mean()) - expected) > 0.05  # the quick formula


def test_density_and_coverage_on_a_line() -> None:
    """By hand, k = 3: each point reaches 2, the ends 3; and what they are for."""
    fake = column(4.5, 4.5, 20.0)  # within the balls of 3, 4, 5, 6
    assert density_coverage(LINE, fake, 3) == (8 / 9, 4 / 10)
    assert density_coverage(LINE, LINE + 100) == (0.0, 0.0)
    real, generated = normal(400, 2), normal(300, 2, seed=1)
    outlier = torch.tensor([[30.0, 30.0]], dtype=F64)
    density, coverage = density_coverage(real, generated)
    assert density == pytest.approx(1.0, abs=0.15)  # its mean for equal distributions
    assert coverage == pytest.approx(0.93, abs=0.06)
    with_one = torch.cat([generated, outlier])
    assert density_coverage(real, with_one)[1] == coverage
    assert density_coverage(torch.cat([real, outlier]), generated)[0] < 1.05 * density
    for few in (real[:5], generated[:0]):
        with pytest.raises(ValueError, match="density and coverage need more than k = 5 real"):
            density_coverage(few, few)
    with pytest.raises(ValueError, match="a feature vector is not finite"):
        density_coverage(real, real / 0)
    with pytest.raises(ValueError, match=r"of one D, got \[\(400, 2\), \(300, 1\)\]"):
        precision_recall(real, generated[:, :1])


def test_nearest() -> None:
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    points = torch.tensor([[0.0, 1.0], [3.0, 3.5], [-3.0, -4.0], [3.0, 4.0]])
    assert nearest(points, reference).tolist() == [1.0, 0.5, 5.0, 0.0]
    crowd = normal(5000, 8).float() + 100  # far from zero and in several chunks: still exact
    assert nearest(crowd, crowd).max() == 0
    assert nearest(crowd, crowd[:-1])[-1] > 0


class Counter:
    """A generator whose picture number i is the number i."""

    classes = 20
    sampler = SimpleNamespace(calls=3)

    def sample(self, seeds: range) -> Tensor:
        return torch.tensor(list(seeds), dtype=F64)[:, None]


def test_evaluate_scores_fresh_samples_in_every_draw() -> None:
    """Draw d is 10 d, ..., 10 d + 9 against 0 .. 9: every score is known by hand."""
    measure: Any = lambda x: (x, x[:, 0].long())  # noqa: E731
    sample_metrics = SampleMetrics("fd_line", LINE, LINE[:4], torch.arange(4), measure, limit=1e9)
    generator: Any = Counter()
    *_, last = evaluate(generator, sample_metrics, samples=10, draws=3)
    assert last["fd_line"] == pytest.approx((0 + 100 + 400) / 3, abs=1e-9)
    assert last["fd_line_std"] == pytest.approx(208.16659994661327)
    assert last["swd"] == pytest.approx(10.0)
    assert last["swd_std"] == pytest.approx(10.0)
    assert last["nn"] == pytest.approx((0 + 5.5 + 15.5) / 3)
    assert last["precision"] == pytest.approx((1.0 + 0.3 + 0.0) / 3)
    assert last["recall"] == pytest.approx((1.0 + 0.3 + 0.0) / 3)
    assert last["accuracy"] == pytest.approx((1.0 + 1.0 + 0.0) / 3)  # labels are modulo 20
    assert (last["calls"], last["calls_std"], last["draws"]) == (3.0, 0.0, 3.0)
    assert {"ms_per_image", "ms_per_image_std"} < last.keys()
    widths = (math.sqrt(5 / 3) - math.sqrt(55 / 6)) ** 2  # of 0 .. 3 and of 0 .. 9
    assert last["fd_line_of_4"] == pytest.approx((3**2 + 7**2 + 17**2) / 3 + widths)
    real = real_scores(sample_metrics, samples=10)
    assert real["fd_line_of_4"] == real["fd_line"] == pytest.approx(9 + widths)
    assert "fd_line_of_4" not in real_scores(sample_metrics, samples=4)
    assert metric("fd_line_of_4", "fd_line").better == "lower"
    assert metric("recall_of_4").better == "higher"
    assert metric("recall_of_4").meaning.startswith("recall of the first 4 samples")
    narrow = SampleMetrics("fd_line", LINE, LINE, torch.arange(10), measure, limit=4.0)
    assert score(LINE, None, narrow)["nn"] == 0.0
    assert score(LINE + 100, None, narrow)["nn"] == 0.0  # clipped to 4 first
    assert "accuracy" not in score(LINE, None, narrow)


def test_summarise() -> None:
    found = summarise([{"a": 1.0, "b": 5.0}, {"a": 2.0, "b": 5.0}, {"a": 6.0, "b": 5.0}])
    assert found == {"a": 3.0, "a_std": math.sqrt(7), "b": 5.0, "b_std": 0.0, "draws": 3.0}
    assert summarise([{"a": 4.0}]) == {"a": 4.0, "a_std": 0.0, "draws": 1.0}


def test_shipped_features_recognise_held_out_digits() -> None:
    """363 of 364 held-out digits; the same bits twice, whatever the batch."""
    train, held = digits.load_digits()
    features, found = features_and_labels("digits", held.x0)
    assert (found == held.labels).sum() == 363
    assert (features_and_labels("digits", train.x0)[1] == train.labels).double().mean() > 0.999
    assert torch.equal(features_and_labels("digits", held.x0)[0], features)
    torch.testing.assert_close(features_and_labels("digits", held.x0, batch=7)[0], features)
    assert features.shape == (364, 64)


def class_gaussians(count: int) -> tuple[Tensor, Tensor]:
    """Samples of a Gaussian fitted to each digit's training pixels, and their labels."""
    train, _ = digits.load_digits()
    x, labels = [], torch.arange(10).repeat_interleave(count)
    for digit in range(10):
        pixels = train.x0[train.labels == digit].flatten(1).double()
        spread = root(torch.cov(pixels.T))
        x.append(pixels.mean(0) + normal(count, 64, seed=digit) @ spread)
    return torch.cat(x).float().reshape(-1, 1, 8, 8), labels


def test_frechet_alone_does_not_expose_class_gaussians_but_precision_does() -> None:
    """Two Gaussian impostors: by class (fd 3.0 against 1.3 of held-out digits), and one for all.

    By class the distance looks decent, a seventh of the cruder one, and the labels are right;
    every third picture lies outside the real ones, of the held-out digits every seventh.
    """
    sample_metrics = Digits().sample_metrics()
    real, fake = real_scores(sample_metrics), score(*class_gaussians(143), sample_metrics)
    train = sample_metrics.reference.flatten(1).double()
    crude = train.mean(0) + normal(1430, 64) @ root(torch.cov(train.T))
    worse = score(crude.float().reshape(-1, 1, 8, 8), None, sample_metrics)
    assert real["fd_digits"] < fake["fd_digits"] < 0.2 * worse["fd_digits"]
    assert fake["accuracy"] > 0.95
    assert fake["precision"] < 0.7 < 0.8 < real["precision"]
    assert fake["recall"] < 0.82 < 0.88 < real["recall"]
    assert worse["precision"] < 0.2


def test_only_the_nearest_neighbour_exposes_a_memoriser() -> None:
    """A copy of the training set wins every other score."""
    sample_metrics = Digits().sample_metrics()
    train, _ = digits.load_digits()
    copy, real = score(train.x0.clone(), train.labels, sample_metrics), real_scores(sample_metrics)
    assert copy["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert (copy["precision"], copy["recall"], copy["swd"], copy["accuracy"]) == (1, 1, 0, 1)
    assert copy["nn"] == 0.0
    assert real["nn"] == pytest.approx(2.135, abs=0.01)
    assert (real["calls"], real["ms_per_image"], real["draws"]) == (0.0, 0.0, 1.0)
