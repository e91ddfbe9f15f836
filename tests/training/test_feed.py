"""Batches that are made early are the same, in the order in which they are asked for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batches import Images
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Method
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sida import SiDA
from fewstep.nets.mlp import MLP
from fewstep.training.feed import Feed, moved
from fewstep.training.loop import train
from fewstep.training.optim import Optim

CPU = torch.device("cpu")
X0 = torch.randn(37, 2, generator=torch.Generator().manual_seed(0))
MODEL = Model(MLP(width=8, blocks=1), (2,))


@dataclass
class Watched:
    """Batches of 37 points; notes which samples were made, and whether by another thread."""

    from_disk: bool = True
    broken: int = -1
    made: list[int] = field(default_factory=list)
    elsewhere: list[bool] = field(default_factory=list)

    def __call__(self, draws: Draws) -> Batch:
        first = int(draws.index[0])
        self.made.append(first)
        self.elsewhere.append(threading.current_thread() is not threading.main_thread())
        if first == self.broken:
            raise ValueError("a picture is damaged")
        return Images(X0)(draws)


def _teacher() -> Any:
    return MODEL.build(seed=1)


def same(a: Batch, b: Batch) -> bool:
    assert a.x0 is not None
    assert b.x0 is not None
    assert a.draws is not None
    assert b.draws is not None
    indices = torch.equal(a.draws.index, b.draws.index)
    return torch.equal(a.z, b.z) and torch.equal(a.x0, b.x0) and indices


def test_a_batch_is_made_once_and_early() -> None:
    source = Watched()
    feed = Feed(source, 3, CPU)
    for start in (0, 4, 8, 12):
        assert same(feed.batch(start, 4), Images(X0)(Draws.range(start, 4, 3)))
        feed.expect(start + 4, 4)
    feed.batch(16, 4)
    assert source.made == [0, 4, 8, 12, 16]
    assert source.elsewhere == [False, True, True, True, True]


def test_what_was_expected_in_vain_is_dropped() -> None:
    """Another batch comes, of another size or place; a batch of the past is not kept either."""
    source = Watched()
    feed = Feed(source, 0, CPU)
    for start, count in ((4, 4), (8, 2), (40, 4), (0, 4)):
        feed.expect(4, 4)
        assert same(feed.batch(start, count), Images(X0)(Draws.range(start, count)))
        assert all(key[0] > start for key in feed._coming)


def test_in_memory_nothing_is_made_early() -> None:
    source = Watched(from_disk=False)
    feed = Feed(source, 0, CPU)
    feed.expect(0, 4)
    assert source.made == []
    feed.batch(0, 4)
    assert source.elsewhere == [False]


def test_an_error_is_that_of_its_own_batch() -> None:
    feed = Feed(Watched(broken=4), 0, CPU)
    feed.expect(4, 4)
    feed.batch(0, 4)
    feed.expect(4, 4)
    with pytest.raises(ValueError, match="damaged"):
        feed.batch(4, 4)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", [SiDA(), Pretrain()], ids=["SiDA", "Pretrain"])
def test_a_run_has_the_same_bits(method: Method, accumulate: int) -> None:
    """Of one and two turns a step; all but the first batch were made early, none in vain."""
    runs: list[Tensor] = []
    for from_disk in (False, True):
        source, teacher = Watched(from_disk), _teacher()
        optim: Any = Optim(1e-3)
        settings: Any = {"batch": 12, "steps": 4, "accumulate": accumulate, "optim": optim}
        *_, last = train(method, teacher, MODEL.build(seed=1), source, **settings)
        runs.append(torch.cat([p.flatten() for p in last.state.average.parameters()]))
        turns = len(method.turns(0))
        parts = [12 // accumulate * k for k in range(4 * turns * accumulate)]
        # the one that is expected at the end may not have been begun
        assert source.made[: len(parts)] == parts
        assert source.elsewhere[: len(parts)] == [False] + [from_disk] * (len(parts) - 1)
    assert torch.equal(*runs)


def test_all_of_a_batch_is_moved() -> None:
    x = torch.ones(2, 3)
    more = {"pair_z": x}
    batch = Batch(x, {"prompt": x, "deep": {"more": x}}, x, Draws.range(0, 2), more)
    found: Any = moved(batch, torch.device("meta"))
    tensors = [found.z, found.x0, found.draws.index, found.more["pair_z"]]
    tensors += [found.cond["prompt"], found.cond["deep"]["more"]]
    assert [t.device.type for t in tensors] == ["meta"] * 6
    assert moved(Batch(x), torch.device("meta"))[1:] == (None, None, None, {})
    kept: Any = moved(found, CPU)  # what a source keeps elsewhere is not fetched
    assert kept.x0.device.type == "meta"
