"""Pairs: each sample is the teacher's own map of the noise and condition it comes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Images, Latents
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Batch
from fewstep.distillation.pairs import Pairs, make_pairs, pair_of
from fewstep.methods.dmd import DMD
from fewstep.teachers.gaussian import Gaussian


def teacher() -> Generator:
    net = Gaussian(torch.tensor([0.4, -0.7]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]), VE())
    return Generator(net, Heun(Karras(), 40), (2,))


def test_a_pair_is_the_teachers_own_map_of_its_noise() -> None:
    """Noise is not stored: it is made again for each batch, with the samples that belong to it."""
    source = make_pairs(Pairs(7), teacher(), Latents((2,)))
    found = pair_of(DMD(), source(Draws.range(5, 40)))
    made = teacher().sampler(teacher().denoiser, found.z)
    torch.testing.assert_close(made, found.x0, rtol=1e-5, atol=1e-5)
    assert len(found.z.unique(dim=0)) == 7
    assert not torch.allclose(made.flip(0), found.x0, atol=0.1)  # another order is seen


def test_pairs_have_the_conditions_of_their_noise() -> None:
    source = make_pairs(Pairs(50), Generator(Echo(), FewStep(), (2,)), Latents((2,), classes=9))
    found = pair_of(DMD(), source(Draws.range(0, 64)))
    assert torch.equal(found.x0[:, 0], found.cond.float())
    assert len(found.cond.unique()) > 4


class Echo(nn.Module):
    """A denoiser whose samples are their labels."""

    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("here", torch.zeros(()))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = cond[:, None].expand_as(xt).float()
        return out


def test_conditions_of_text_travel_with_the_pair() -> None:
    """A mapping of tensors comes back as one."""

    def source(draws: Draws) -> Batch:
        z = draws.normal("z", (2,))
        return Batch(z, {"words": z + 1, "mask": z > 0}, None, draws)

    class Reads(Echo):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            out: Tensor = cond["words"] * cond["mask"]
            return out

    found = pair_of(
        DMD(), make_pairs(Pairs(5), Generator(Reads(), FewStep(), (2,)), source)(Draws.range(0, 9))
    )
    assert set(found.cond) == {"words", "mask"}
    assert torch.equal(found.x0, found.cond["words"] * found.cond["mask"])
    assert torch.equal(found.cond["words"], found.z + 1)


def test_batches_are_those_of_the_source_and_a_pure_function_of_their_numbers() -> None:
    plain = Images(torch.arange(10.0)[:, None].repeat(1, 2))
    source = make_pairs(Pairs(5), teacher(), plain)
    draws = Draws.range(0, 6)
    assert torch.equal(source(draws).z, plain(draws).z)
    assert torch.equal(source(draws).more["pair_x0"], source(draws).more["pair_x0"])
    part = source(Draws.range(3, 3)).more["pair_x0"]
    assert torch.equal(source(draws).more["pair_x0"][3:], part)


def test_noise_of_pairs_is_not_that_of_training() -> None:
    source = make_pairs(Pairs(4), teacher(), Latents((2,)))
    found = source(Draws.range(0, 200))
    assert torch.cdist(found.z, found.more["pair_z"]).min() > 1e-6


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Pairs.count is 1 or more, got 0"):
        Pairs(0)
    with pytest.raises(ValueError, match=r"DMD needs pairs .* make_pairs"):
        pair_of(DMD(), Latents((2,))(Draws.range(0, 2)))
