"""fewstep sample: pictures from a finished model into one file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from fewstep.data.autoencoder import as_pictures
from fewstep.files import write
from fewstep.report.grid import grid, png, to_uint8
from fewstep.teachers.convert import open_model


def numbers(text: str, what: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    out: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{what} are written like 0-63 or 3,7,9, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63:
            raise ValueError(f"{what} end at 2^63 - 1, got {last}")
        if len(out) + last - first >= 1_000_000:
            raise ValueError(f"{what}: more than a million numbers in {text!r}")
        out += range(first, last + 1)
    return out


def make(model: Path, seeds: str, labels: str, out: Path, vae: str = "") -> None:
    """Sample `model` and write a grid (.png) or arrays (.npz: images uint8, seeds, labels).

    Latents are decoded by the autoencoder in the folder `vae`.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    index = numbers(seeds, "--seeds")
    if not index:
        raise ValueError("--seeds names no sample")
    generator, _ = as_pictures(open_model(model), vae)
    chosen = numbers(labels, "--labels") or None
    if chosen is not None and len(chosen) == 1:
        chosen = chosen * len(index)
    x = generator.sample(index, chosen)
    if out.suffix == ".png":
        columns = 10 if generator.classes == 10 and not chosen else None
        write(out, png(grid(x, columns)))
        return
    arrays = {"images": to_uint8(x) if x.ndim == 4 else x.numpy(), "seeds": np.array(index)}
    if generator.classes:
        arrays["labels"] = np.array(chosen or [i % generator.classes for i in index])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write(out, buffer.getvalue())
