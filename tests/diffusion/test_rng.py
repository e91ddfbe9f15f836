"""Counter-based randomness: known answers, independence of batching, moments.

Statistical bounds are four standard errors of the stated sample size; seeds are fixed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fewstep.diffusion import rng as module
from fewstep.diffusion.rng import Draws, philox

COUNT = 200_000
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    """Random123's published vectors for philox4x32 with ten rounds."""
    k0, k1 = words(key)
    found = philox([torch.tensor([w]) for w in words(counter)], (k0, k1))
    assert [int(w) for w in found] == words(answer)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was encrypted by torch's operations: the number of words, call by call."""
    calls: list[int] = []

    def counted(counter: Any, key: tuple[int, int]) -> tuple[Tensor, ...]:
        words = philox(counter, key)
        calls.append(4 * words[0].numel())
        return words

    monkeypatch.setattr(module, "philox", counted)
    return calls


@pytest.mark.parametrize("count", [1, 3, 8, 70_001])
def test_numpy_draws_the_bits_of_torch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """For numbers of all sizes, in order and not, and for more words than numpy takes at once."""
    calls = spied(monkeypatch)
    index = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5, -1, -(2**40)])
    for some in (index, index[::2], index.flip(0), index[:0]):
        fast = Draws(some, 3).bits("a", count)
        assert not calls
        with monkeypatch.context() as patch:
            patch.setattr(module, "_is_plain", lambda index: False)
            assert torch.equal(fast, Draws(some, 3).bits("a", count))
        assert calls == [len(some) * (count + -count % 4)]
        calls.clear()


def test_small_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some samples, and of some words of one, for sizes that they do not divide."""
    whole = Draws.range(5, 7).bits("a", 41)
    for part in (1, 4, 25, 64):
        monkeypatch.setattr(module, "_PART", part)
        assert torch.equal(Draws.range(5, 7).bits("a", 41), whole)


def drawn(index: Tensor) -> Tensor:
    return Draws(index, 2).normal("z", (3,))


@pytest.mark.slow
def test_compiled_draws_are_the_same() -> None:
    compiled = torch.compile(drawn, backend="eager")
    for index in (torch.arange(6), torch.arange(6) + 2**33):
        assert torch.equal(compiled(index), drawn(index))


def test_traced_and_transformed_draws_are_operations_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vmap, make_fx, fake tensors and "meta": never the numbers of the time of tracing."""
    calls, index = spied(monkeypatch), torch.arange(6) * 1000
    expected = drawn(index)
    assert not calls
    mapped = torch.func.vmap(lambda one: drawn(one[None])[0])(index)
    assert torch.equal(mapped, expected)
    graph = make_fx(drawn)(torch.zeros_like(index))
    assert torch.equal(graph(index), expected)
    assert len(calls) == 2
    with FakeTensorMode() as mode:
        assert drawn(mode.from_tensor(index)).shape == (6, 3)
    assert drawn(index.to("meta")).is_meta
    assert len(calls) == 4


def everything(draws: Draws) -> tuple[Tensor, ...]:
    return (
        draws.bits("a", 7),
        draws.uniform("t"),
        draws.integers("label", 10),
        draws.normal("z", (3, 5)),
    )


def test_sample_is_independent_of_batch_size_and_order() -> None:
    whole = everything(Draws.range(0, 64, seed=3))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for index in (torch.arange(10, 20), torch.tensor([63]), order):
        for all_, some in zip(whole, everything(Draws(index, 3)), strict=True):
            assert torch.equal(all_[index], some)


def test_recorded_values() -> None:
    """Runs are resumed with these numbers: a change here changes every recorded run."""
    draws = Draws.range(1, 1, seed=7)
    bits = [2918931002, 3374379751, 1615525292, 2456645899, 1834148059]
    normal = [-0.6259214475165049, -0.624757562901755, 0.616988909988605]
    assert draws.bits("z", 5)[0].tolist() == bits
    found = draws.normal("z", (3,), torch.float64)[0].tolist()
    assert found == pytest.approx(normal, rel=1e-12)


def test_purposes_seeds_prefixes_and_indices_are_different_streams() -> None:
    base = Draws.range(0, 1000, seed=1)
    others = [
        base.normal("eps", (4,)),
        Draws.range(0, 1000, seed=2).normal("z", (4,)),
        base.under("turn").normal("z", (4,)),
        Draws.range(1000, 1000, seed=1).normal("z", (4,)),
        Draws.range(2**32, 1000, seed=1).normal("z", (4,)),
    ]
    z = base.normal("z", (4,))
    for other in others:  # correlation of 4000 independent pairs: error 1/sqrt(4000)
        assert abs(float((z * other).mean())) < 4 / math.sqrt(4000)
    assert torch.equal(z, base.normal("z", (4,)))
    assert torch.equal(base.under("a").under("b").bits("z", 1), base.under("a/b").bits("z", 1))
    assert torch.equal(base.under("a").bits("z", 1), base.bits("a/z", 1))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4)])
def test_normal_moments(shape: tuple[int, ...]) -> None:
    """Moments 1, 2, 3, 4 of N(0, 1): 0, 1, 0, 3, with variances 1, 2, 15, 96."""
    z = Draws.range(0, COUNT, seed=5).normal("z", shape, torch.float64)
    assert z.shape == (COUNT, *shape)
    flat = z.flatten(1)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert ((flat**power).mean(0) - mean).abs().max() < 4 * math.sqrt(variance / COUNT)
    off = flat.T @ flat / COUNT - torch.diag((flat**2).mean(0))
    assert off.abs().max() < 4 / math.sqrt(COUNT)
    inside = (flat.abs() < 1.0).double().mean(0)
    p = math.erf(1 / math.sqrt(2))
    assert (inside - p).abs().max() < 4 * math.sqrt(p * (1 - p) / COUNT)


def test_uniform_moments_and_distribution() -> None:
    u = Draws.range(0, COUNT, seed=5).uniform("t", torch.float64)
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / COUNT)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / COUNT)
    gap = (u.sort().values - (torch.arange(COUNT) + 0.5) / COUNT).abs().max()
    assert float(gap) < 1.95 / math.sqrt(COUNT)  # Kolmogorov and Smirnov, 0.1 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_never_zero_or_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    extremes = torch.tensor([[0], [2**32 - 1]])
    monkeypatch.setattr(module.Draws, "bits", lambda self, purpose, count: extremes)
    u = Draws.range(0, 2).uniform("t", dtype)
    assert 0 < float(u[0]) < 1e-6
    assert 1 - 1e-6 < float(u[1]) < 1
    assert float(u[0]) == 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_finite_at_extreme_words(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    words = torch.tensor([[0, 0], [2**32 - 1, 2**32 - 1], [0, 2**31]])
    monkeypatch.setattr(module.Draws, "bits", lambda self, purpose, count: words)
    z = Draws.range(0, 3).normal("z", (2,), dtype)
    assert z.isfinite().all()
    largest = math.sqrt(66 * math.log(2))  # sqrt(-2 ln 2^-33)
    assert z.abs().max().item() == pytest.approx(largest, rel=1e-6)


def test_integers_are_uniform() -> None:
    """Ten labels: counts within four errors of a tenth, none outside 0 .. 9."""
    labels = Draws.range(0, COUNT, seed=5).integers("label", 10)
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert (counts / COUNT - 0.1).abs().max() < 4 * math.sqrt(0.09 / COUNT)
