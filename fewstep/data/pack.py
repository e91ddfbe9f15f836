"""Any set of pictures as one zip file of equal squares, in the form of StyleGAN and EDM.

    00000/img00000000.png   00000/img00000001.png   ...   dataset.json

The PNGs are not compressed, so that reading them costs little; the file is written under another
name and renamed when it is whole. Equal input gives an equal file.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.errors import Problems, Unfit
from fewstep.data.images import Crop, fit, png, standard
from fewstep.data.labels import FILE
from fewstep.data.picture_set import every
from fewstep.data.readers import Reader


@dataclass
class Packer:
    """Packs a set of pictures into one zip file: `look` at all of them, then `write`.

        for done in packer.look(): ...
        for done in packer.write(): ...

    Both yield the number of pictures done. Grey sets stay grey; if one picture is not, all become
    RGB. An existing file is not replaced.
    """

    reader: Reader
    out: Path
    """The zip file to write."""
    resolution: int = 0
    """Width and height of what is written; 0: as they are, which must be equal squares."""
    crop: Crop = "center"
    labels: Tensor | None = None
    """(N,) int64."""
    grey: bool = True
    """Whether no picture has a colour; known after `look`, as are the following."""
    enlarged: int = 0
    """Pictures that are smaller than `resolution`."""
    size: int = 0
    """Width and height of what is written."""

    def __post_init__(self) -> None:
        if self.resolution < 0:
            raise ValueError(f"the resolution is a number of pixels, got {self.resolution}")
        if self.out.exists() or self.out.suffix != ".zip" or not self.out.parent.is_dir():
            why = "exists already" if self.out.exists() else "is no .zip in a folder that exists"
            raise ValueError(f"{self.out} {why}; choose another name")

    def look(self) -> Generator[int, None, None]:
        """Read all headers; a ValueError names the pictures that cannot be packed."""
        problems = Problems(self.reader.path)
        seen: list[tuple[bool, int]] = [(True, 0)] * len(self.reader)

        def job(place: int, row: int) -> None:
            image = self.reader.header(row)
            if image.width != image.height and not self.resolution:
                raise Unfit("not square; --resolution cuts them", f"{image.width}x{image.height}")
            seen[place] = image.mode in ("L", "1"), min(image.width, image.height)

        yield from every(self.reader, torch.arange(len(seen)), job, problems)
        problems.refuse()
        sides = {side for _, side in seen}
        if len(sides) > 1 and not self.resolution:
            raise ValueError(
                f"{self.reader.path} has pictures of {min(sides)} to {max(sides)} pixels; "
                "--resolution brings them to one size"
            )
        self.size = self.resolution or sides.pop()
        self.grey = all(grey for grey, _ in seen)
        self.enlarged = sum(side < self.size for _, side in seen)

    def write(self) -> Generator[int, None, None]:
        """Write the zip file, whole or not at all."""
        channels = 1 if self.grey else 3
        need = len(self.reader) * (channels * self.size**2 + 300)
        if need > (free := shutil.disk_usage(self.out.parent).free):
            raise ValueError(
                f"{self.out} needs {need >> 20:,} MiB, but {free >> 20:,} MiB are free"
            )
        problems, done = Problems(self.reader.path), 0
        ready: dict[int, bytes] = {}

        def job(place: int, row: int) -> None:
            image = standard(self.reader.image(row))
            image = image.convert("L") if self.grey and image.mode != "L" else image
            image = image.convert("RGB") if not self.grey and image.mode != "RGB" else image
            ready[place] = png(fit(image, self.size, self.crop))

        with replacing(self.out) as file:
            for stop in every(self.reader, torch.arange(len(self.reader)), job, problems):
                for place in range(done, stop):
                    if not problems.counts:
                        _add(file, name(place), ready.pop(place))
                done = stop
                yield done
            problems.refuse()
            _add(file, FILE, json.dumps(self._labels()).encode())

    def _labels(self) -> dict[str, object]:
        """What dataset.json says: labels, and the names of classes where they are known."""
        if self.labels is None:
            return {"labels": None}
        pairs = [[name(i), label] for i, label in enumerate(self.labels.tolist())]
        return {
            "labels": pairs,
            **({"classes": self.reader.classes} if self.reader.classes else {}),
        }


def name(place: int) -> str:
    """The file name of picture number `place`."""
    digits = f"{place:08d}"
    return f"{digits[:5]}/img{digits}.png"


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A member without a time, so that equal content gives an equal file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    file.writestr(info, data)


@contextmanager
def replacing(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file that becomes `path` when the block is left without an error."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as raw:
            with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as file:
                yield file
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
