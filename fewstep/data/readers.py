"""Sets of pictures on disk, read one picture at a time: folders, zip files, .npz arrays.

    reader = reader_of("cifar10.zip")
    reader.names[7], reader.image(7), reader.labels

Pictures are sorted by name, as StyleGAN and EDM sort them. Hidden files and files of other kinds
are passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.data import arrays, labels
from fewstep.data.archive import MEMBER, Archive
from fewstep.data.images import SUFFIXES, decode, peek
from fewstep.data.problems import Unfit


@dataclass(frozen=True, eq=False)
class Reader:
    """A set of pictures whose names and labels are known and match."""

    path: Path
    names: Sequence[str]
    image: Callable[[int], Image.Image]
    """Picture number i, decoded; `Unfit` says why not."""
    header: Callable[[int], Image.Image]
    """The same, not necessarily decoded: for its size and mode."""
    fingerprint: Callable[[], str]
    """Changes when a picture does; found without reading any."""
    labels: Tensor | None = None
    """(N,) int64, or None for pictures without labels."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of their labels; empty where they are not known."""

    def __len__(self) -> int:
        return len(self.names)


def reader_of(path: str | Path) -> Reader:
    """The reader of a folder, a .zip or an .npz; ValueError names what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ValueError(f"there is no folder or file {path} of pictures")
    kinds = {".zip": _zip, ".npz": _npz}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path} is no set of pictures: a folder, a .zip or an .npz file")
    return kinds[path.suffix.lower()](path)


def _folder(path: Path) -> Reader:
    """Picture files anywhere in a folder."""
    found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    names = _pictures(p.relative_to(path).as_posix() for p in found)
    told = path / labels.FILE
    given = labels.content(told) if told.is_file() else None

    def data(row: int) -> bytes:
        with (path / names[row]).open("rb") as file:
            content = file.read(MEMBER + 1)
        if len(content) > MEMBER:
            raise Unfit(f"larger than {MEMBER >> 20} MiB")
        return content

    def fingerprint() -> str:
        total = hashlib.sha256()
        for name in names:
            total.update(f"{name} {(path / name).stat().st_size}\n".encode())
        return total.hexdigest()

    return _files(path, names, data, fingerprint, given)


def _zip(path: Path) -> Reader:
    """Picture files anywhere in a zip file, as EDM's and StyleGAN's data sets are."""
    archive = Archive(path, limits={labels.FILE: labels.LIMIT})
    names = _pictures(archive.members)
    if not names and any(name.endswith(".npy") for name in archive.members):
        raise ValueError(f"{path} holds arrays, not pictures; LatentMoments reads latents")
    given = labels.member(archive) if labels.FILE in archive.members else None

    def data(row: int) -> bytes:
        return archive.read(names[row])

    return _files(path, names, data, archive.fingerprint, given)


def _npz(path: Path) -> Reader:
    """Arrays `images` and, if there, `labels`; see `fewstep.data.arrays`."""
    archive = Archive(path, limit=arrays.LIMIT)
    size, lock = arrays.count(archive), Lock()
    held: list[np.ndarray] = []

    def image(row: int) -> Image.Image:
        with lock:
            if not held:  # not before a picture is wanted: labels may be all that is
                held.append(arrays.images(archive))
        x = held[0][row]
        return Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)

    names = [f"row {i}" for i in range(size)]
    return Reader(path, names, image, image, archive.fingerprint, arrays.labels(archive, size))


def _files(
    path: Path,
    names: Sequence[str],
    data: Callable[[int], bytes],
    fingerprint: Callable[[], str],
    given: bytes | None,
) -> Reader:
    """The reader of picture files; `given` is the content of their dataset.json, if any."""
    if not names:
        raise ValueError(f"{path} holds no picture ({', '.join(sorted(SUFFIXES))})")
    found: Tensor | None = None
    classes: list[str] = []
    pairs, named = labels.parse(given, path) if given is not None else (None, [])
    if pairs is not None:
        found, classes = labels.assign(pairs, names, path), named
    elif given is None and (by_folder := labels.folders(names)):
        found, classes = by_folder

    def image(row: int) -> Image.Image:
        return decode(data(row))

    def header(row: int) -> Image.Image:
        return peek(data(row))

    return Reader(path, names, image, header, fingerprint, found, classes)


def _pictures(names: Iterable[str]) -> list[str]:
    """What of `names` are pictures, sorted."""
    return sorted(
        name
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    )
