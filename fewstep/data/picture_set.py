"""Checked pictures of one shape, as uint8, in memory where they fit; and batches of them.

Every picture is decoded once before training starts, so that damaged and ill-sized ones are named
then. A set that does not fit in memory is decoded again batch by batch; that it was found sound is
remembered, so that a continued run starts at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batches import epoch_order
from fewstep.data.errors import Problems, Unfit
from fewstep.data.images import Alone, among_others, framed, pixels, standard
from fewstep.data.readers import Reader
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.training.progress import report_progress

MEMORY = 2 << 30
"""Bytes of pictures that are held in memory."""
PART = 256
"""Pictures that are decoded at a time."""

Shape = tuple[int, ...]


@lru_cache(maxsize=1)
def pool() -> ThreadPoolExecutor:
    """Threads for decoding, which happens outside Python's lock."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")


def array(reader: Reader, row: int, shape: Shape, resolution: int = 0) -> np.ndarray:
    """Picture `row` as (C, H, W) uint8, which is `shape`; `Unfit` says why it is not.

    With a `resolution` any picture is brought to `shape`: cut to its proportions and resized.
    """
    image = reader.image(row)
    if resolution:
        grey = shape[0] == 1
        image = framed(standard(image).convert("L" if grey else "RGB"), shape[2], shape[1])
    x = pixels(image).transpose(2, 0, 1)
    if x.shape != shape:
        raise Unfit(f"of another shape than {_text(shape)}", _text(x.shape))
    return x


def first_shape(reader: Reader) -> Shape:
    """(C, H, W) of the first picture, which all others of a set are to have, by its header."""
    try:
        first = reader.header(0)
    except Unfit as error:
        raise ValueError(f"{reader.path}: the first, {reader.names[0]}, is {error}") from None
    return first.channels, first.height, first.width


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


class Named(Protocol):
    """A set whose members have names."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the members, in order."""


def every(
    reader: Named, rows: Tensor, job: Callable[[int, int], None], problems: Problems
) -> Iterator[int]:
    """Call job(place, row) for all `rows`, in threads; yields how many are done.

    `Unfit` pictures are collected in `problems`. Pictures that unpack to much more than their size
    are decoded one at a time, after the others.
    """

    def attempt(place: int) -> Exception | None:
        try:
            job(place, int(rows[place]))
        except (Alone, Unfit) as error:
            return error
        return None

    def beside(place: int) -> Exception | None:
        with among_others():
            return attempt(place)

    for start in range(0, len(rows), PART):
        places = range(start, min(start + PART, len(rows)))
        for place, error in zip(places, pool().map(beside, places), strict=True):
            error = attempt(place) if isinstance(error, Alone) else error
            if isinstance(error, Unfit):
                problems.add(str(error), reader.names[int(rows[place])], error.detail)
        yield places.stop


@dataclass(frozen=True, eq=False)
class PictureSet:
    """The pictures `rows` of a reader, all of one shape."""

    reader: Reader
    rows: Tensor
    shape: Shape
    """(C, H, W)"""
    resolution: int = 0
    held: Tensor | None = None
    """(N, C, H, W) uint8, or None where they are decoded when they are wanted."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Tensor) -> Tensor:
        """(B, C, H, W) uint8 pictures at the `places` (B,) of this set."""
        if self.held is not None:
            return self.held[places]
        out = np.empty((len(places), *self.shape), np.uint8)
        problems = Problems(self.reader.path)

        def job(place: int, row: int) -> None:
            out[place] = array(self.reader, row, self.shape, self.resolution)

        for _ in every(self.reader, self.rows[places], job, problems):
            pass
        problems.refuse()
        return torch.from_numpy(out)


def spread_labels(count: int, size: int) -> Tensor:
    """Indices of `count` members, evenly spread over a set of `size`; all for 0."""
    if not count or count >= size:
        return torch.arange(size)
    return torch.arange(count) * size // count


def load_pictures(
    reader: Reader, rows: Tensor, shape: Shape, resolution: int = 0, memory: int = MEMORY
) -> PictureSet:
    """Pictures of one shape, every one checked, and held in memory where they fit.

    Arguments:
        reader: the set of pictures.
        rows: (N,) which of them.
        shape: (C, H, W) that each must have; with `resolution` each is brought to it.
        resolution: height to cut and resize to, in pixels; 0: as they are.
        memory: bytes of pictures that may be held; larger sets are decoded batch by batch.
    Returns the set, whose `take` gives uint8 (B, C, H, W).
    Raises ValueError that names the pictures which are damaged or of another shape.
    """
    held = None
    if len(rows) * int(np.prod(shape)) <= memory:
        held = torch.empty(len(rows), *shape, dtype=torch.uint8)
    marker = None if held is not None else Marker.of(reader, shape, resolution)
    if marker is None or not marker.there():
        problems = Problems(reader.path)
        into = None if held is None else held.numpy()

        def job(place: int, row: int) -> None:
            x = array(reader, row, shape, resolution)
            if into is not None:
                into[place] = x

        for done in every(reader, rows, job, problems):
            report_progress("checking pictures", done, len(rows))
        problems.refuse()
        if marker is not None and len(rows) == len(reader):
            marker.put()
    return PictureSet(reader, rows, shape, resolution, held)


@dataclass(frozen=True)
class Marker:
    """An empty file in the cache: these pictures were all sound. Losing it only costs time."""

    path: Path

    @classmethod
    def of(cls, reader: Reader, shape: Shape, resolution: int = 0) -> Marker:
        """In the cache of the user, named by path, fingerprint and dates of the pictures."""
        path = reader.path.resolve()
        names = reader.names if path.is_dir() else [""]
        changed = hash(tuple((path / name).stat().st_mtime_ns for name in names))
        what = f"{path} {reader.fingerprint()} {changed} {shape} {resolution} upright"
        home = os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.cache"
        name = hashlib.sha256(what.encode()).hexdigest()[:32]
        return cls(Path(home) / "fewstep" / "sound" / name)

    def there(self) -> bool:
        """Whether these pictures were checked before."""
        return self.path.is_file()

    def put(self) -> None:
        """Record the check, if the cache can be written to."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Batches of pictures in [-1, 1], epoch by epoch; with `flip` half of them mirrored."""

    pictures: PictureSet
    labels: Tensor | None = None
    """(N,) int64 of the pictures."""
    flip: bool = False

    @property
    def from_disk(self) -> bool:
        """Whether a batch is decoded from files."""
        return self.pictures.held is None

    def __call__(self, draws: Draws) -> Batch:
        device = draws.index.device
        rows = epoch_order(draws, len(self.pictures)).cpu()
        x0 = self.pictures.take(rows).to(device).float() / 127.5 - 1
        if self.flip:
            mirrored = draws.uniform("flip") < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        cond = None if self.labels is None else self.labels[rows].to(device)
        return Batch(draws.normal("z", x0.shape[1:]), cond, x0, draws)


@dataclass(frozen=True, eq=False)
class LabelsAlone:
    """Data-free batches: noise of `shape`, and labels as frequent as in a data set.

    They are the labels that `Shuffled` would give, without any picture, as in SiD's official
    training, which reads labels from the data set and never its pixels.
    """

    shape: Shape
    labels: Tensor

    def __call__(self, draws: Draws) -> Batch:
        rows = epoch_order(draws, len(self.labels)).cpu()
        cond = self.labels[rows].to(draws.index.device)
        return Batch(draws.normal("z", self.shape), cond, None, draws)
