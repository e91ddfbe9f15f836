"""Small sets of pictures as files, of every kind that fewstep reads."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    """Random pictures: (count, size, size, channels) uint8."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), np.uint8)


def encoded(x: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """A picture (H, W, C) or (H, W) as the bytes of a file."""
    buffer = io.BytesIO()
    plain = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    Image.fromarray(plain).save(buffer, form, **options)
    return buffer.getvalue()


def files(x: np.ndarray) -> dict[str, bytes]:
    """Pictures as files under the names of StyleGAN's and EDM's data sets."""
    return {f"00000/img{i:08d}.png": encoded(picture) for i, picture in enumerate(x)}


def array(x: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def moments(x: np.ndarray) -> dict[str, bytes]:
    """Moments of latents (N, 8, H, W) as files under the names of EDM2's data sets."""
    return {f"00000/img-mean-std-{i:08d}.npy": array(m) for i, m in enumerate(x)}


def labelled(names: Mapping[str, bytes], labels: Any) -> dict[str, bytes]:
    """The files and a dataset.json."""
    pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    return {**names, "dataset.json": json.dumps({"labels": pairs}).encode()}


def as_folder(path: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_bytes(content: Mapping[str, bytes]) -> bytes:
    """The bytes of a zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return out.getvalue()


def as_zip(path: Path, content: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def as_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path
