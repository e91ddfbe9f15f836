"""Pictures as arrays in an .npz file, read without unpickling and held in memory.

images   uint8, (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3
labels   integers (N,); may be missing
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from fewstep.data.archive import Archive
from fewstep.data.images import PIXELS
from fewstep.data.labels import CLASSES
from fewstep.data.problems import Problems, Unfit

LIMIT = 16 << 30
"""Bytes of one array."""


def images(archive: Archive) -> np.ndarray:
    """The pictures of an .npz file as uint8 (N, H, W, C); ValueError where there are none."""
    path = archive.path
    if "images.npy" not in archive.members:
        there = ", ".join(sorted(archive.members)) or "nothing"
        raise ValueError(f"{path} has no array 'images'; it holds {there}")
    x = _array(archive, "images")
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not 0 < x[:1].size <= 3 * PIXELS:
        raise ValueError(
            f"{path}: images must be uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W), "
            f"got {x.dtype} {x.shape}"
        )
    x = x[..., None] if x.ndim == 3 else x
    if x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images must have 1 or 3 channels, got the shape {x.shape}")
    return np.ascontiguousarray(x)


def labels(archive: Archive, count: int) -> Tensor | None:
    """The labels of the `count` pictures of an .npz file, (N,) int64; None where it has none."""
    if "labels.npy" not in archive.members:
        return None
    found = _array(archive, "labels")
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise ValueError(
            f"{archive.path}: labels must be {count} integers, one a picture, got "
            f"{found.dtype} {found.shape}"
        )
    problems = Problems(archive.path)
    for row in ((found < 0) | (found >= CLASSES)).nonzero()[0].tolist():
        problems.add("with a label that is no class number", f"row {row}", str(found[row]))
    problems.refuse()
    return torch.from_numpy(found.astype(np.int64))


def _array(archive: Archive, name: str) -> np.ndarray:
    """The array `name`: its header says plain numbers, as many as there are bytes for."""
    try:
        data = archive.read(f"{name}.npy")
        file = io.BytesIO(data)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        if dtype.hasobject:
            raise Unfit("made of Python objects")
        flat = np.frombuffer(data, dtype, offset=file.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except Unfit as error:
        raise ValueError(f"{archive.path}: the array {name!r} is {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError):
        raise ValueError(f"{archive.path}: {name!r} is no sound .npy array") from None
