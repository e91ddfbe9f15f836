"""Samples of any shape: nothing depends on how their numbers are laid out.

An MLP sees the numbers of a sample in a row, so that signals (C, L) and films (C, T, H, W) have
the losses and gradients of the same numbers as vectors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.policies import GMFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch, Sampler
from fewstep.distillation.method import Method
from fewstep.distillation.pictures import give_decoder
from fewstep.nets.mlp import MLP
from fewstep.training.modes import training_only
from tests.instances import METHODS, SAMPLERS
from tests.methods.test_battery import in_a_row, stirred, turns
from tests.parameters import once_a_class

CLASSES = 3
FLAT = (12,)
SHAPES = [(2, 6), (1, 2, 3, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def network(shape: tuple[int, ...], seed: int) -> nn.Module:
    return stirred(Model(MLP(16, 1), shape, CLASSES).build(seed).double(), seed)


def batch(shape: tuple[int, ...]) -> Batch:
    draws = Draws.range(0, 5)
    names = ("z", "x0", "pair_z", "pair_x0")
    z, x0, pair_z, pair_x0 = (draws.normal(name, shape, torch.float64) for name in names)
    cond = draws.integers("label", CLASSES)
    return Batch(z, cond, x0, draws, {"pair_z": pair_z, "pair_x0": pair_x0, "pair_cond": cond})


@cache
def found(method: Method, shape: tuple[int, ...]) -> list[Tensor]:
    """Losses, sums and gradients of all turns; those in a row serve every shape."""
    out = []
    for turn in turns(method):
        teacher: Any = network(shape, 0).requires_grad_(False)
        give_decoder(teacher, in_a_row)
        nets = method.init(teacher, network(shape, 1))
        for number, net in enumerate(nets.values()):
            stirred(net, number + 2)
        with training_only(nets, turn.net) as trained:
            loss = turn.loss(nets, teacher, batch(shape))
            out += [total for total in (loss.total, *loss.sums.values()) if total is not None]
            if loss.total is not None:
                loss.total.backward()
            out += [p.grad for p in trained.parameters() if p.grad is not None]
    return [tensor.detach().double() for tensor in out]


def by_pixel(method: Method) -> bool:
    """Whether it has a mixture in each pixel, over its channels: there the layout counts."""
    return isinstance(getattr(method.sampler, "policy", None), GMFlow)


@pytest.mark.parametrize(
    "shape", [pytest.param(SHAPES[0], marks=pytest.mark.slow), SHAPES[1]], ids=str
)
@pytest.mark.parametrize("method", once_a_class(m for m in METHODS if not by_pixel(m)), ids=repr)
def test_a_step_is_that_of_the_same_numbers_in_a_row(
    method: Method, shape: tuple[int, ...]
) -> None:
    ours, theirs = found(method, shape), found(method, FLAT)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@each_shape
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samples_are_those_of_the_same_numbers_in_a_row(
    sampler: Sampler, shape: tuple[int, ...]
) -> None:
    def samples(shape: tuple[int, ...]) -> Tensor:
        model = Model(MLP(16, 1), shape, CLASSES, inputs=("s",))
        net: Any = stirred(model.build(0), 0).double()
        given = batch(shape)
        return sampler(net, given.z, given.cond, given.draws)

    x = samples(shape)
    assert x.shape == (5, *shape)
    torch.testing.assert_close(x.flatten(1), samples(FLAT), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(x[0], x[1], rtol=1e-3)
