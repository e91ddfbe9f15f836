"""Losses on pictures: the decoder that a teacher brings, and distances in features."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from fewstep.distillation.pictures import (
    PictureFeatures,
    feature_distance,
    give_decoder,
    pictures_of,
)


class Linear(PictureFeatures):
    """The picture itself and its rows summed, as two layers of one channel more."""

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        grey = pictures[:, 0]
        return torch.stack([grey, torch.ones_like(grey)], 1), torch.stack(
            [grey[:, 0, 0], 0 * grey[:, 0, 0]], 1
        )


def decode(x: Tensor) -> Tensor:
    """Latents (B, 2, H, W) -> (B, 1, H, W), by a product that autocast would round."""
    return conv2d(x, torch.tensor([3.0, -1.0], dtype=x.dtype)[None, :, None, None])


def test_a_teacher_without_a_decoder_makes_pictures() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert pictures_of(nn.Identity(), x) is x
    with pytest.raises(ValueError, match=r"needs \(B, 1 or 3, H, W\), got \(2, 4, 4, 4\); give"):
        pictures_of(nn.Identity(), torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        pictures_of(nn.Identity(), torch.zeros(2, 5))


def test_gradients_pass_the_decoder_which_copies_share() -> None:
    """It is neither copied, nor part of the weights, nor run in half precision."""
    teacher = nn.Conv2d(2, 2, 1)
    before = list(teacher.state_dict())
    give_decoder(teacher, decode)
    assert list(teacher.state_dict()) == before
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        made = pictures_of(copy.deepcopy(teacher), x.bfloat16())
    assert made.dtype == torch.float32
    made.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, 0], torch.full((2, 4, 4), 3.0))
    assert torch.equal(x.grad[:, 1], torch.full((2, 4, 4), -1.0))
    fine = x.detach().double().requires_grad_()
    made = pictures_of(teacher, fine)
    assert made.dtype == torch.float64
    made.sum().backward()
    assert fine.grad is not None


def test_the_distance_in_features_is_that_of_directions() -> None:
    """By hand: two layers, the first over four positions, the second over one."""
    x, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    x[0, 0, 0, 0] = 1.0  # direction (1, 1)/sqrt 2 against (0, 1) at one position of four
    found = feature_distance(Linear(), x.double(), y.double())
    first = ((0.5**0.5) ** 2 + (0.5**0.5 - 1) ** 2) / 4
    assert found.tolist() == pytest.approx([first + 1.0], abs=1e-6)
    assert feature_distance(Linear(), x, x).tolist() == [0.0]
    twice = feature_distance(Linear(), torch.cat([x, y]), torch.cat([y, y])).tolist()
    assert twice == pytest.approx([first + 1.0, 0.0], abs=1e-6)
