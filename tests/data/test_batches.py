"""Sources: every epoch a permutation, independent of batching; labels dropped at their rate."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.data.batches import Images, Latents, epoch_order
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.loop import train


def test_every_epoch_is_a_permutation_and_each_another_one() -> None:
    size = 97
    order = epoch_order(Draws.range(0, 4 * size, seed=1), size).reshape(4, size)
    for epoch in order:
        assert epoch.sort().values.tolist() == list(range(size))
    for i in range(4):
        assert order[i].tolist() != list(range(size))
        for j in range(i):  # two random permutations agree in one place on average
            assert int((order[i] == order[j]).sum()) < 8
    other = epoch_order(Draws.range(0, size, seed=2), size)
    assert int((other == order[0]).sum()) < 8


def test_order_is_independent_of_batch_size() -> None:
    whole = epoch_order(Draws.range(0, 300, seed=1), 97)
    parts = [epoch_order(Draws.range(i, 25, seed=1), 97) for i in range(0, 300, 25)]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="the data set is empty"):
        epoch_order(Draws.range(0, 3), 0)


def test_images_come_with_their_labels_and_noise() -> None:
    labels = torch.arange(50)
    source = Images(labels.double()[:, None].expand(50, 3), labels)
    draws = Draws.range(0, 50, seed=3)
    batch = source(draws)
    assert batch.x0 is not None
    assert torch.equal(batch.x0[:, 0].long(), batch.cond)
    assert sorted(batch.cond.tolist()) == list(range(50))
    torch.testing.assert_close(batch.z, draws.normal("z", (3,)).double(), rtol=0, atol=0)
    assert Images(source.x0)(draws).cond is None


def test_labels_are_dropped_at_their_rate() -> None:
    """20,000 labels, a fifth dropped: within four standard errors; the others keep theirs."""
    labels = torch.arange(10).repeat(2000)
    draws = Draws.range(0, 20_000, seed=3)
    whole = Images(labels[:, None].float(), labels)(draws).cond
    batch = Images(labels[:, None].float(), labels, 0.2, 10)(draws)
    dropped = batch.cond == 10
    error = math.sqrt(0.2 * 0.8 / 20_000)
    assert abs(float(dropped.double().mean()) - 0.2) < 4 * error
    assert torch.equal(batch.cond[~dropped], whole[~dropped])


def test_latents() -> None:
    draws = Draws.range(0, 1000, seed=3)
    batch = Latents((2, 3), classes=4)(draws)
    assert batch.x0 is None
    assert torch.equal(batch.z, draws.normal("z", (2, 3)))
    assert sorted(set(batch.cond.tolist())) == [0, 1, 2, 3]
    assert Latents((2,))(draws).cond is None


def test_data_that_would_be_ignored_are_refused() -> None:
    teacher, net = GaussianMixture.ring(3), Model(MLP(16, 1), (2,)).build(1)
    records = train(SiD(), teacher, net, Images(torch.zeros(4, 2)), batch=2, steps=1)
    with pytest.raises(ValueError, match=r"^SiD learns without data, but the source gives some"):
        next(records)
