"""Samples of every shape as pictures: which number is seen where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.image_grid import FRAMES, as_pictures, curves, grid, scatter, tiled
from fewstep.diffusion.pixels import NotFinite


def test_a_curve_passes_through_its_numbers() -> None:
    """The largest of all is at the edge, 0 in the middle, and each column has a point at least."""
    x = torch.zeros(2, 1, 64)
    x[0, 0] = torch.linspace(-1, 1, 64)
    picture = curves(x, side=64)[:, 0]
    lit = picture[0] == 1
    for column, value in ((0, -1.0), (20, float(x[0, 0, 20])), (63, 1.0)):
        rows = lit[:, column].nonzero()[:, 0]
        expected = (1 - value / 1.05) / 2 * 63
        assert rows.min() - 1 <= expected <= rows.max() + 1
    assert bool(lit.any(0).all())
    flat = (picture[1] == 1).nonzero()
    assert set(flat[:, 0].tolist()) == {32}
    assert len(flat) == 64


def test_later_channels_are_darker_and_behind() -> None:
    x = torch.tensor([[[0.5] * 8, [-0.5] * 8], [[0.5] * 8, [0.5] * 8]])
    first, same = curves(x, side=33)[:, 0]
    assert sorted(first.unique().tolist()) == pytest.approx([-1, -0.7, 0.4, 1], abs=1e-6)
    assert float(first[int(torch.tensor(16 - 16 / 1.05).round()), 4]) == pytest.approx(1)
    assert 0.4 not in [round(value, 3) for value in same.unique().tolist()]


def test_tiles() -> None:
    """Three parts in two columns, row by row; what is left is dark."""
    x = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, -1], [2, 2, -1, -1]])
    assert torch.equal(tiled(x, 1)[0], expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 5, 7), (1, 5, 7)),
        ((3, 5, 7), (3, 5, 7)),
        ((4, 5, 7), (3, 5, 7)),
        ((2, 5, 7), (1, 5, 14)),
        ((3, 4, 5, 7), (3, 10, 14)),
        ((2, 4, 5, 7), (1, 10, 28)),
        ((1, 50, 2, 2), (1, 6, 6)),
        ((9,), (1, 64, 64)),
        ((2, 9), (1, 64, 64)),
        ((2, 1, 2, 1, 2), (1, 64, 64)),
    ],
)
def test_every_shape_is_a_picture(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = torch.linspace(-1, 1, 6 * int(np.prod(shape))).reshape(6, *shape)
    assert as_pictures(x).shape == (6, *expected)
    scale = max(1, round(48 / max(expected[1:])))
    high, wide = (side * scale + 4 for side in expected[1:])
    assert grid(x, columns=3).size == (3 * wide + 4, 2 * high + 4)


def test_frames_are_in_order_and_evenly_spread() -> None:
    film = torch.arange(17.0)[None, None, :, None, None].expand(1, 1, 17, 1, 1)
    assert as_pictures(film).flatten().tolist() == [2.0 * k for k in range(FRAMES)]


def test_points_are_a_scatter_plot() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert np.array_equal(np.asarray(grid(x)), scatter(x)[..., 0])


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFinite):
        grid(torch.full((2, 9), float("nan")))
