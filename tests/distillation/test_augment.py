"""Augmentation: exact on the pixel grid, an analytic picture elsewhere, labels that tell it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.augment import SYM6, Augment, diagonal, resample, rotation, translation
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore, Rollout, add_noise, augment_samples
from fewstep.distillation.guidance_scales import Unguided
from fewstep.losses.adversarial import cross_entropy, logits
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight
from fewstep.teachers import edm

F64 = torch.float64
SIZE = 32
NONE = torch.eye(3, dtype=F64)[None]


def one(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def field(x: Tensor, y: Tensor) -> Tensor:
    """Two blobs, no symmetry, nearly nothing at the border."""
    return torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.08) - 0.5 * torch.exp(
        -((x + 0.3) ** 2 + (y - 0.3) ** 2) / 0.05
    )


def picture(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    grid = (torch.arange(SIZE, dtype=F64) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    return f(x, y)[None, None]


def moved(m: Tensor) -> Tensor:
    """The analytic picture whose point p is the field's at m p."""
    (a, b, c), (d, e, f), _ = m[0].tolist()
    return picture(lambda x, y: field(a * x + b * y + c, d * x + e * y + f))


def test_filter_is_orthonormal() -> None:
    taps = torch.tensor(SYM6, dtype=F64)
    assert float(taps.sum()) == pytest.approx(2**0.5, abs=1e-11)
    for lag in range(6):
        overlap = float((taps[: 12 - 2 * lag] * taps[2 * lag :]).sum())
        assert overlap == pytest.approx(float(lag == 0), abs=1e-11)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (16, 24)])
def test_an_unmoved_picture_is_itself(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=F64, generator=seeded(0))
    assert (resample(x, NONE.repeat(2, 1, 1)) - x).abs().max() < 1e-10
    off = resample(x, translation(one(0.1, 0.0)[:, None]).repeat(2, 1, 1))
    assert (off - x).abs().max() > 0.1


def test_whole_pixels_are_exact() -> None:
    x = torch.randn(1, 1, 16, 16, dtype=F64, generator=seeded(0))
    found = resample(x, translation(one(2 / 16 * 3, -2 / 16)[:, None]))
    assert (found[:, :, 1:, :13] - x[:, :, :15, 3:]).abs().max() < 1e-10
    assert (found[0, 0, 0, :12] - x[0, 0, 1, 3:15]).abs().max() < 1e-10  # mirrored
    assert (found[0, 0, 0, :12] - x[0, 0, 0, 3:15]).abs().max() > 0.1


@pytest.mark.parametrize(
    "move",
    [
        rotation(one(0.5)),
        rotation(one(math.pi)),
        diagonal(one(1.2), one(0.8)),
        translation(one(0.13, -0.07)[:, None]),
        rotation(one(0.5)) @ translation(one(0.13, -0.07)[:, None]),
        rotation(one(-0.4)) @ diagonal(one(1.1), one(1 / 1.1)) @ rotation(one(0.4)),
    ],
    ids=["turn", "turn round", "stretch", "shift", "turn, shift", "stretch askew"],
)
def test_moves_are_those_of_the_plane(move: Tensor) -> None:
    """Away from the border, to the error of linear interpolation at half a pixel."""
    found, inner = resample(picture(field), move), slice(6, -6)
    error = (found - moved(move))[..., inner, inner].abs().max()
    assert error < 8e-3
    assert (found - picture(field))[..., inner, inner].abs().max() > 0.1


def test_labels_are_zero_without_movement_and_tell_it_otherwise() -> None:
    draws = Draws.range(0, 4000)
    still, labels = Augment(p=0.0).moves(draws)
    assert (still - torch.eye(3)).abs().max() < 1e-6
    assert not labels[:, 1:].any()
    assert abs(float(labels[:, 0].mean()) - 0.5) < 4 * 0.5 / 4000**0.5  # a coin for the x flip
    _, labels = Augment(p=0.25).moves(draws)
    for column, share in ((1, 0.125), (2, 0.25), (4, 0.25), (5, 0.25), (7, 0.25), (8, 0.25)):
        found = float((labels[:, column] != 0).double().mean())
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5, column
    moving = labels[labels[:, 2] != 0, 2]
    assert abs(float(moving.std()) - 1) < 4 / (2 * len(moving)) ** 0.5


@pytest.mark.parametrize("p", [0.12, 0.6, 1.0])
def test_the_law_of_every_movement(p: float) -> None:
    """How often each happens, that they do so independently, and what n, w and r are then.

    Each share, and each mean of a number whose law is known, within 4.5 standard errors.
    """
    count = 20_000
    _, labels = Augment(p).moves(Draws.range(0, count, seed=3))
    labels = labels.double()

    def close(x: Tensor, mean: float, variance: float) -> None:
        assert abs(float(x.double().mean()) - mean) < 4.5 * math.sqrt(variance / len(x)) + 1e-12

    happens = {"scale": labels[:, 2] != 0, "turn": labels[:, 4] != 0, "shift": labels[:, 7] != 0}
    happens |= {"stretch": labels[:, 5:7].abs().amax(1) != 0, "shift too": labels[:, 8] != 0}
    happens |= {"flip x": labels[:, 0] == 1, "flip y": labels[:, 1] == 1}
    shares = dict.fromkeys(happens, p) | {"flip x": 0.5, "flip y": p / 2}
    for name, there in happens.items():
        close(there, shares[name], shares[name] * (1 - shares[name]))
        for other, also in happens.items():
            if other != name and {name, other} != {"shift", "shift too"}:
                both = shares[name] * shares[other]
                close(there & also, both, both * (1 - both))
    assert torch.equal(happens["shift"], happens["shift too"])
    assert set(labels[:, :2].unique().tolist()) == {0.0, 1.0}
    turned, stretched = labels[happens["turn"]], labels[happens["stretch"]]
    for n in (
        labels[happens["scale"], 2],
        *labels[happens["shift"], 7:].T,
        stretched[:, 5:7].norm(dim=1),
    ):
        close(n.square(), 1.0, 2.0)
        close(n.pow(4), 3.0, 96.0)
    w = torch.atan2(turned[:, 4], turned[:, 3] + 1)
    for k in (1, 2, 3):
        close((k * w).cos(), 0.0, 0.5)
        close((k * w).sin(), 0.0, 0.5)
    close(w.abs(), math.pi / 2, math.pi**2 / 12)
    straight = stretched[:, 6] == 0
    close(straight, 0.5, 0.25)
    close(stretched[straight, 5], 0.0, 1.0)
    a, b = stretched[~straight, 5:7].T
    close((2 * torch.atan2(b, a)).cos(), 0.0, 0.5)  # of an axis: the sign of n turns it round
    close((2 * torch.atan2(b, a)).sin(), 0.0, 0.5)
    close((4 * torch.atan2(b, a)).cos(), 0.0, 0.5)


def test_a_turn_of_a_wide_picture_is_a_turn_of_its_pixels() -> None:
    """By 90 degrees, as `rot90`; and all moves are those of a square in pixels."""
    x = torch.nn.functional.pad(picture(field), [8, 8, 0, 0])
    aspect = 48 / 32
    sides = diagonal(one(aspect), one(1.0))
    turn = torch.linalg.inv(sides) @ rotation(one(math.pi / 2)) @ sides
    expected, middle = picture(field)[0, 0].rot90(), slice(8, 40)
    assert (resample(x, turn)[0, 0, :, middle] - expected).abs().max() < 8e-3
    unlike = resample(x, rotation(one(math.pi / 2)))[0, 0, :, middle]
    assert (unlike - expected).abs().max() > 0.1
    draws = Draws.range(0, 50)
    square, wide = (Augment(1.0).moves(draws, r)[0].double() for r in (1.0, aspect))
    expected = torch.linalg.inv(sides) @ square @ sides
    assert (wide - expected)[:, :2, :2].abs().max() < 1e-5
    assert (wide - square)[:, :2, :2].abs().max() > 0.1
    assert torch.equal(Augment(1.0).moves(draws)[0].double(), square)
    blank = Augment(0.0)(x.expand(50, -1, -1, -1), draws)[0]  # flips in x are those of any p
    flips = Augment(1.0).moves(draws)[1][:, 1] == 1
    blank[flips] = blank[flips].flip(2)
    found = Augment(1.0)(x.expand(50, -1, -1, -1), draws)[0]
    assert (found - resample(blank, wide)).abs().max() < 1e-5
    assert (found - resample(blank, square)).abs().max() > 0.1


@pytest.mark.parametrize("pixels", [3, 12, 14, 15, 17, 25, 40])
def test_beyond_the_border_is_the_mirror_image_and_then_nothing(pixels: int) -> None:
    """Shifted by whole pixels, away from where the mirror image ends, 15 pixels out."""
    x = torch.randn(2, 1, 16, 16, dtype=F64, generator=seeded(0))
    for sign in (1, -1):
        shift = translation(one(2 / 16 * pixels * sign, 0.0)[:, None]).repeat(2, 1, 1)
        found = resample(x, shift)
        for column in range(16):
            source = column + sign * pixels
            mirror = -source if source < 0 else 30 - source if source > 15 else source
            if source < -21 or source > 36:
                assert found[..., column].abs().max() < 1e-10
            elif -9 <= source <= 24:
                assert (found[..., column] - x[..., mirror]).abs().max() < 1e-10


def test_the_map_can_be_told_from_the_labels() -> None:
    """Rebuilt from the labels alone: scale, rotation, stretch and shift in EDM's order.

    A stretch by n along r has the labels of a squeeze by n along the opposite direction.
    """
    maps, labels = Augment(p=0.7).moves(Draws.range(0, 200))
    _, _, n, cos, sin, a, b, dx, dy = labels.double().T
    size, axis = (a**2 + b**2).sqrt(), torch.atan2(b, a)
    errors = []
    for stretch in (size, -size):
        expected = (
            diagonal(2 ** (-0.2 * n), 2 ** (-0.2 * n))
            @ rotation(torch.atan2(sin, cos + 1))
            @ rotation(-axis)
            @ diagonal(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch))
            @ rotation(axis)
            @ translation(-torch.stack([dx, dy]) / 4)
        )
        errors.append((maps.double() - expected).abs().amax((1, 2)))
    assert torch.minimum(*errors).max() < 1e-5
    assert all(float(error.max()) > 0.1 for error in errors)


def test_flips_are_exact_and_samples_are_their_own() -> None:
    x = torch.randn(64, 1, 8, 8, generator=seeded(0))
    found, labels = Augment(p=0.0)(x, Draws.range(0, 64))
    flipped = torch.where(labels[:, :1, None, None] > 0, x.flip(3), x)
    assert (found - flipped).abs().max() < 1e-5
    some = torch.tensor([5, 40])
    again, told = Augment(p=0.5)(x[some], Draws(some))
    whole, all_told = Augment(p=0.5)(x, Draws.range(0, 64))
    assert torch.equal(told, all_told[some])
    assert (again - whole[some]).abs().max() < 1e-6


def test_real_and_generated_samples_move_independently() -> None:
    x = torch.zeros(500, 1, 8, 8)
    batch = Batch(x, draws=Draws.range(0, 500))
    (fake,), (real,) = (augment_samples(Augment(0.5), x, batch, n)[1] for n in ("augment", "real"))
    correlation = torch.corrcoef(torch.stack([fake[:, 7], real[:, 7]]))[0, 1]
    assert abs(float(correlation)) < 4 / 500**0.5
    assert augment_samples(None, x, batch) == (x, ())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Augment.p is a probability, got 1.5"):
        Augment(p=1.5)
    with pytest.raises(ValueError, match=r"Augment moves pictures \(B, C, H, W\), got \(4, 2\)"):
        Augment()(torch.zeros(4, 2), Draws.range(0, 4))


def test_the_fake_score_is_told() -> None:
    """FakeScore and Critic: the network's own arguments, and the loss of the moved pictures."""
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1]}
    kwargs |= {"num_blocks": 1, "attn_resolutions": [], "augment_dim": 9}
    net = edm.new_network(kwargs).eval()
    for number, parameter in enumerate(net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=seeded(number)) * 0.3
    x0 = torch.randn(6, 1, 8, 8, generator=seeded(0))
    batch = Batch(torch.randn(6, 1, 8, 8, generator=seeded(1)), None, x0, Draws.range(0, 6))
    nets: Any = {"student": net, "fake": net}
    rollout, moves = Rollout(FewStep(2.5), 1), Augment(0.9)
    x, labels = moves(FewStep(2.5)(net, batch.z).detach(), batch.draws.under("augment"))
    n = add_noise(net.path, x, LogNormal(), batch)
    weight = EDMWeight()(x, x, n.alpha, n.sigma)
    expected = denoising(net(n.xt, n.t, None, labels), x, weight).mean()
    told = FakeScore(augment=moves).turn(rollout).loss(nets, net, batch)
    assert torch.equal(told.total, expected)
    untold = denoising(net(n.xt, n.t), x, weight).mean()
    assert abs(float(untold - expected)) > 1e-4
    both = Critic(augment=moves).turn(rollout, Unguided()).loss(nets, net, batch)
    assert torch.equal(both.logs["denoising"], expected)
    real, real_labels = moves(x0, batch.draws.under("augment/real"))
    m = add_noise(net.path, real, LogNormal(), batch)
    maps = (
        logits(net.encode(m.xt, m.t, None, real_labels)),
        logits(net.encode(n.xt, n.t, None, labels)),
    )
    judged = weight.mean() * cross_entropy(*maps).mean()
    torch.testing.assert_close(both.logs["discriminator"], judged)
    torch.testing.assert_close(both.total, expected + judged / 64)
