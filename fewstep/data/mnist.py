"""MNIST from the user's own copy: 70,000 handwritten digits, brought to 16x16 pixels.

LeCun, Bottou, Bengio & Haffner 1998, https://doi.org/10.1109/5.726791. Nothing of it ships with
the package. The file is a plain .npz (`numpy.load` with allow_pickle=False) with

    images  (70000, 28, 28, 1) uint8        labels  (70000,) integers 0 .. 9

whose first 60,000 rows are the training set, the rest the test set. A border of two black pixels
makes pictures of 32x32, whose 2x2 blocks are averaged.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data import npz
from fewstep.data.digits import LabelledImages
from fewstep.data.zip_archive import ZipArchive

SHAPE = (1, 16, 16)
CLASSES = 10
SIGMA_DATA = 0.5
"""Standard deviation of the pixels, in [-1, 1]; 0.5025 in the training set."""
TRAIN, TEST = 60_000, 10_000
LIMIT = 1 << 30
"""Bytes of an array in the file."""


@lru_cache(maxsize=1)
def load_mnist(path: str) -> tuple[LabelledImages, LabelledImages]:
    """(training digits, test digits), (60000, 1, 16, 16) and (10000, 1, 16, 16) in [-1, 1].

    Raises ValueError where `path` is missing or is not the file described above. The result is
    kept for the next call: do not write into it.
    """
    images, labels = _read(Path(path))
    x0 = shrink(torch.from_numpy(images))
    y = torch.from_numpy(labels.astype(np.int64))
    return LabelledImages(x0[:TRAIN], y[:TRAIN]), LabelledImages(x0[TRAIN:], y[TRAIN:])


def shrink(images: Tensor, chunk: int = 10_000) -> Tensor:
    """Grey levels (N, 28, 28, 1) uint8 -> pictures (N, 1, 16, 16) float32, black = -1.

    A pixel is the mean of a 2x2 block of the padded picture: output row i covers the rows 2i - 2
    and 2i - 1 of the input.
    """
    out = torch.empty(len(images), *SHAPE)
    for part, small in zip(images.split(chunk), out.split(chunk), strict=True):
        padded = F.pad(part[..., 0].float(), (2, 2, 2, 2))
        small.copy_(F.avg_pool2d(padded[:, None], 2) / 127.5 - 1)
    return out


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as stored, checked."""
    if not path.is_file():
        raise ValueError(
            f"there is no MNIST file {path}; say where mnist.npz is with --domain.path or the "
            "environment variable FEWSTEP_MNIST"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file")
    try:
        archive = ZipArchive(path, limit=LIMIT)
        if not {"images.npy", "labels.npy"} <= set(archive.members):
            names = ", ".join(name.removesuffix(".npy") for name in archive.members)
            raise ValueError(f"the file holds {names or 'nothing'}")
        images, labels = (npz.array(archive, name).copy() for name in ("images", "labels"))
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: images and labels cannot be read: {why}") from None
    count = TRAIN + TEST
    if images.shape != (count, 28, 28, 1) or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: images must be ({count}, 28, 28, 1) uint8, got {images.shape} {images.dtype}"
        )
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels must be ({count},) integers, got {labels.shape} {labels.dtype}"
        )
    if not 0 <= labels.min() <= labels.max() < CLASSES:
        raise ValueError(f"{path}: labels are 0 to 9, got {labels.min()} to {labels.max()}")
    return images, labels
