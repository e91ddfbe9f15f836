"""Arrays in an .npz file, pictures or others, read without unpickling and held in memory.

images   uint8, (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3
x        floats, (N, *): samples of any other kind
labels   integers (N,); may be missing
"""

from __future__ import annotations

import io
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.data.errors import Problems, Unfit
from fewstep.data.images import PIXELS
from fewstep.data.labels import CLASSES
from fewstep.data.zip_archive import MEMBERS, ZipArchive

LIMIT = 16 << 30
"""Bytes of one array."""
HEADER = 1 << 16
"""Bytes in which the header of an array ends."""


def opened(path: str | Path) -> ZipArchive:
    """The .npz file `path`; ValueError where it is none."""
    path = Path(path)
    if not path.is_file() or path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is no .npz file of arrays")
    return ZipArchive(path, limit=LIMIT)


def float_shape(archive: ZipArchive, name: str) -> tuple[int, ...]:
    """(N, *), the shape of an array of floats; ValueError where it is no N samples of them."""
    path = archive.path
    if f"{name}.npy" not in archive.members:
        there = ", ".join(sorted(archive.members)) or "nothing"
        raise ValueError(f"{path} has no array {name!r}; it holds {there}")
    shape, _, dtype, _ = header(archive, name)
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) < 2 or not prod(shape):
        raise ValueError(
            f"{path}: {name} must be floats of shape (N, *), one sample or more, got {dtype} "
            f"{shape}"
        )
    return shape


def floats(archive: ZipArchive, name: str) -> Tensor:
    """The array that `float_shape` has described, (N, *) float32; ValueError names what is wrong.

    All numbers have to be finite.
    """
    x = torch.from_numpy(array(archive, name).astype(np.float32))
    problems = Problems(archive.path)
    for row in (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist():
        problems.add("with a number that is not finite", f"row {row}")
    problems.refuse()
    return x


def count(archive: ZipArchive) -> int:
    """How many pictures an .npz file has, found without reading one; ValueError if there are none.

    That `images` are of the right type and shape is found too.
    """
    path = archive.path
    if "images.npy" not in archive.members:
        there = ", ".join(sorted(archive.members)) or "nothing"
        raise ValueError(f"{path} has no array 'images'; it holds {there}")
    shape, _, dtype, _ = header(archive, "images")
    if dtype != np.uint8 or len(shape) not in (3, 4) or not 0 < prod(shape[1:]) <= 3 * PIXELS:
        raise ValueError(
            f"{path}: images must be uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W), "
            f"got {dtype} {shape}"
        )
    if not 0 < shape[0] <= MEMBERS:
        raise ValueError(f"{path} holds {shape[0] or 'no'} pictures; 1 to {MEMBERS:,} are read")
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] not in (1, 3):
        raise ValueError(f"{path}: images must have 1 or 3 channels, got the shape {shape}")
    return shape[0]


def images(archive: ZipArchive) -> np.ndarray:
    """The pictures that `count` has counted, as uint8 (N, H, W, C)."""
    x = array(archive, "images")
    x = x[..., None] if x.ndim == 3 else x
    return np.ascontiguousarray(x if x.shape[3] in (1, 3) else x.transpose(0, 2, 3, 1))


def labels(archive: ZipArchive, count: int) -> Tensor | None:
    """The labels of the `count` pictures of an .npz file, (N,) int64; None where it has none."""
    if "labels.npy" not in archive.members:
        return None
    stored = array(archive, "labels")
    if stored.shape != (count,) or stored.dtype.kind not in "iu":
        raise ValueError(
            f"{archive.path}: labels must be {count} integers, one a picture, got "
            f"{stored.dtype} {stored.shape}"
        )
    problems = Problems(archive.path)
    for row in ((stored < 0) | (stored >= CLASSES)).nonzero()[0].tolist():
        problems.add("with a label that is no class number", f"row {row}", str(stored[row]))
    problems.refuse()
    return torch.from_numpy(stored.astype(np.int64))


class Header(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    end: int
    """Where the numbers begin."""


def header(archive: ZipArchive, name: str) -> Header:
    """The header of the array `name`, found without reading its numbers."""
    try:
        return _parse(archive, name, archive.head(f"{name}.npy", HEADER))
    except Unfit:
        raise _unsound(archive, name) from None


def array(archive: ZipArchive, name: str) -> np.ndarray:
    """The array `name`: plain numbers, as many as there are bytes for."""
    try:
        data = archive.read(f"{name}.npy")
        shape, fortran, dtype, end = _parse(archive, name, data)
        flat = np.frombuffer(data, dtype, offset=end)
        return flat.reshape(shape, order="F" if fortran else "C")
    except Unfit:
        raise _unsound(archive, name) from None


def _parse(archive: ZipArchive, name: str, data: bytes) -> Header:
    """The header that `data` begins with, fit for the size of the member."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        file = io.BytesIO(data[:HEADER])
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        size = file.tell() + prod(shape) * dtype.itemsize
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError):
        raise _unsound(archive, name) from None
    if dtype.hasobject:
        raise ValueError(f"{archive.path}: the array {name!r} is made of Python objects")
    wrong = min(shape, default=0) < 0 or size != archive.members[f"{name}.npy"].file_size
    if wrong or not dtype.itemsize:
        raise _unsound(archive, name)
    return Header(shape, fortran, dtype, file.tell())


def _unsound(archive: ZipArchive, name: str) -> ValueError:
    return ValueError(f"{archive.path}: {name!r} is no sound .npy array")
