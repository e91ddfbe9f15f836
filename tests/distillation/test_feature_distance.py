"""The distance in features: by hand, and of one view of both samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.augment import Augment
from fewstep.distillation.feature_distance import FeatureDistance, sample_distance
from fewstep.distillation.pictures import PictureFeatures
from fewstep.losses.distance import SquaredL2

F64 = torch.float64


class Whole(PictureFeatures):
    """A picture as one vector."""

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        return [pictures.flatten(1)]


class Channels(nn.Module):
    """Features of four channels at four places: x and what is fixed beside it."""

    path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None, *labels: Tensor) -> Tensor:
        return torch.cat([xt, xt**2 + 1, torch.ones_like(xt)], 1) * (1 + t[:, None, None, None])

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


@pytest.mark.parametrize("augment", [None, Augment(1.0)])
def test_the_distance_in_features(augment: Augment | None) -> None:
    """By hand; zero for equal samples, so both have the same noise and the same movement."""
    draws, net = Draws.range(0, 5), Channels()
    x, y = draws.normal("x", (1, 8, 8), F64), draws.normal("y", (1, 8, 8), F64)
    d = FeatureDistance(Discrete((0.5,)), augment=augment)
    given = Batch(x, None, None, draws)
    assert torch.equal(d(net, x, x, given, None), torch.zeros(5, dtype=F64))
    found = d(net, x, y, given, None)
    noise = 0.5 * draws.under("features").normal("eps", (1, 8, 8)).double()
    f, g = (F.normalize(net.encode(one + noise, noise[:, 0, 0, 0]), dim=1) for one in (x, y))
    if augment is None:
        torch.testing.assert_close(found, ((f - g) ** 2).sum(1).mean((1, 2)))
    else:
        assert bool((found > 0).all())
    other = given._replace(draws=Draws.range(5, 5))
    assert not torch.equal(d(net, x, y, other, None), found)
    assert torch.equal(sample_distance(d, net, x, y, given, None), found)
    plain = sample_distance(SquaredL2(), net, x, y, given, None)
    torch.testing.assert_close(plain, ((x - y) ** 2).mean((1, 2, 3)))
    seen = sample_distance(Whole(), net, x, y, given, None)
    torch.testing.assert_close(seen, 2 - 2 * F.cosine_similarity(x.flatten(1), y.flatten(1)))
    with pytest.raises(ValueError, match=r"x0 has shape \(5, 1, 8, 7\) but prediction has shape"):
        d(net, x, y[..., 1:], given, None)


def test_layers_are_summed() -> None:
    class Two(nn.Module):
        path = VE()

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 3).double(), nn.Linear(3, 4).double()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return self.two(self.one(xt))  # type: ignore[no-any-return]

    draws, net = Draws.range(0, 5), Two()
    x, y = draws.normal("x", (2,), F64), draws.normal("y", (2,), F64)
    given, law = Batch(x, None, None, draws), Discrete((0.5,))
    found = [
        FeatureDistance(law, layers)(net, x, y, given, None)
        for layers in (("one", "two"), ("one",), ("two",))
    ]
    torch.testing.assert_close(found[0], found[1] + found[2])
    with pytest.raises(ValueError, match=r"but Two has no encoder features"):
        FeatureDistance(law)(net, x, y, given, None)
