"""The embedded example: 1,797 handwritten digits of 8x8 pixels, bundled with scikit-learn.

Optical recognition of handwritten digits, E. Alpaydin and C. Kaynak, UCI machine learning
repository, 1998. A fixed fifth of each class is held out and never trained on.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SHAPE = (1, 8, 8)
CLASSES = 10
SIGMA_DATA = 0.75
"""Standard deviation of the pixels, in [-1, 1]."""
INSTALL = "pip install 'fewstep[demo]'"

Table = np.ndarray[Any, np.dtype[np.float64]]


class LabelledImages(NamedTuple):
    """Pictures (N, 1, 8, 8) in [-1, 1] and labels (N,) int64."""

    x0: Tensor
    labels: Tensor


def _table() -> Table:
    """scikit-learn's file: a row a digit, its 64 pixels in 0 .. 16 and its label.

    It is found and read by its path, since the library itself takes a second to import.
    """
    found = find_spec("sklearn")
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise ValueError(f"the digits come with scikit-learn: {INSTALL}")
    path = Path(folders[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise ValueError(f"scikit-learn has no {path}; install it anew: {INSTALL}")
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",")


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """(training digits, held-out digits): 1,433 and 364 of them."""
    numbers = torch.from_numpy(_table())
    x0 = numbers[:, :-1].float().reshape(-1, *SHAPE) / 8 - 1
    labels = numbers[:, -1].long()
    generator = torch.Generator().manual_seed(1998)
    held = torch.zeros(len(x0), dtype=torch.bool)
    for digit in range(CLASSES):
        rows = (labels == digit).nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held[shuffled[: -(-len(rows) // 5)]] = True
    return LabelledImages(x0[~held], labels[~held]), LabelledImages(x0[held], labels[held])
