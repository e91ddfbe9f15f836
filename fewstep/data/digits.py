"""The embedded example: 1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn.

Optical recognition of handwritten digits, E. Alpaydin and C. Kaynak, UCI machine learning
repository, 1998. A fixed fifth of each class is held out and never trained on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SHAPE = (1, 8, 8)
CLASSES = 10
SIGMA_DATA = 0.75
"""Standard deviation of the pixels, in [-1, 1]."""


class LabelledImages(NamedTuple):
    """Pictures (N, 1, 8, 8) in [-1, 1] and labels (N,) int64."""

    x0: Tensor
    labels: Tensor


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """(training digits, held-out digits): 1,433 and 364 of them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits come with scikit-learn: pip install 'fewstep[demo]'"
        ) from None
    bunch = load_digits()
    x0 = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1998)
    held = torch.zeros(len(x0), dtype=torch.bool)
    for digit in range(CLASSES):
        rows = (labels == digit).nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held[shuffled[: -(-len(rows) // 5)]] = True
    return LabelledImages(x0[~held], labels[~held]), LabelledImages(x0[held], labels[held])
