"""Sets of pictures on disk, read one picture at a time: folders, zip files, .npz arrays.

    reader = reader_of("cifar10.zip")
    reader.names[7], reader.image(7), reader.labels

Pictures are sorted by name, as StyleGAN and EDM sort them. Hidden files and files of other kinds
are passed over; `notes` counts them, and what else was done unasked.
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

from fewstep.data import labels, npz
from fewstep.data.errors import Unfit
from fewstep.data.images import SUFFIXES, Head, alone, decode, head
from fewstep.data.notes import Notes
from fewstep.data.zip_archive import MEMBER, ZipArchive
from fewstep.storage.bounded_reading import regular


@dataclass(frozen=True, eq=False)
class Reader:
    """A set of pictures on disk, with names and labels that match; pictures are read on demand."""

    path: Path
    names: Sequence[str]
    image: Callable[[int], Image.Image]
    """Picture number i, decoded and upright; `Unfit` says why not."""
    header: Callable[[int], Head]
    """Its size and mode, mostly without decoding it."""
    fingerprint: Callable[[], str]
    """Changes when a picture does; found without reading any."""
    labels: Tensor | None = None
    """(N,) int64, or None for pictures without labels."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of their labels; empty where they are not known."""
    notes: Notes = field(default_factory=Notes)
    """What was done unasked; of pictures, once they have been read."""

    def __len__(self) -> int:
        return len(self.names)


def reader_of(path: str | Path) -> Reader:
    """Open a set of pictures: names and labels are read and checked, pictures are not decoded.

    Arguments:
        path: a folder, a .zip, or an .npz with an array `images`.
    Returns the reader, with pictures in the order of their names.
    Raises ValueError where there is no such set, it holds no picture, or its labels do not match.
    """
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
    notes, files = Notes(), list[str]()
    for p in path.rglob("*"):
        name = p.relative_to(path).as_posix()
        if p.is_file() or p.name == labels.FILE:  # which is refused where it is a pipe
            files.append(name)
        elif p.is_symlink() or not p.is_dir():
            notes.add("passed over, no regular files", name)
    names = _pictures(files, path, notes)
    place = _table(files, names, notes)
    given = labels.content(path / place, len(names)) if place is not None else None

    def data(row: int) -> bytes:
        with regular(path / names[row]) as file:
            try:
                content = file.read(MEMBER + 1)
            except OSError as error:  # which does not say of what
                raise OSError(error.errno, error.strerror, str(path / names[row])) from None
        if len(content) > MEMBER:
            raise Unfit(f"larger than {MEMBER >> 20} MiB")
        return content

    def fingerprint() -> str:
        total = hashlib.sha256()
        for name in names:
            total.update(f"{name} {(path / name).stat().st_size}\n".encode())
        return total.hexdigest()

    return _files(path, names, data, fingerprint, (place, given), notes)


def _zip(path: Path) -> Reader:
    """Picture files anywhere in a zip file, as EDM's and StyleGAN's data sets are."""
    archive, notes = ZipArchive(path, limits={labels.FILE: labels.LIMIT}), Notes()
    files = [name for name in archive.members if not name.endswith("/")]
    if not any(map(_shown, files)) and any(name.endswith(".npy") for name in files):
        raise ValueError(f"{path} holds arrays, not pictures; LatentMoments reads latents")
    names = _pictures(files, path, notes)
    place = _table(files, names, notes)
    given = labels.member(archive, place, len(names)) if place is not None else None

    def data(row: int) -> bytes:
        info = archive.members[names[row]]
        alone(info.file_size, info.compress_size)
        return archive.read(names[row])

    return _files(path, names, data, archive.fingerprint, (place, given), notes)


def _npz(path: Path) -> Reader:
    """Arrays `images` and, if there, `labels`; see `fewstep.data.npz`."""
    archive = ZipArchive(path, limit=npz.LIMIT)
    size, lock = npz.count(archive), Lock()
    held: list[np.ndarray] = []

    def image(row: int) -> Image.Image:
        with lock:
            if not held:  # not before a picture is wanted: labels may be all that is
                held.append(npz.images(archive))
        x = held[0][row]
        return Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)

    def header(row: int) -> Head:
        x = image(row)
        return Head(x.mode, len(x.getbands()), x.width, x.height)

    names = [f"row {i}" for i in range(size)]
    return Reader(path, names, image, header, archive.fingerprint, npz.labels(archive, size))


def _files(
    path: Path,
    names: Sequence[str],
    data: Callable[[int], bytes],
    fingerprint: Callable[[], str],
    table: tuple[str | None, bytes | None],
    notes: Notes,
) -> Reader:
    """The reader of picture files; `table` is their dataset.json, if any: its name and content."""
    assigned: Tensor | None = None
    classes: list[str] = []
    place, given = table
    if place is not None and given is not None:
        pairs, named = labels.parse_labels(given, path, len(names))
        if pairs is not None:
            home = place.removesuffix(labels.FILE)
            assigned = labels.assign_labels(
                pairs, [name.removeprefix(home) for name in names], path
            )
            classes = named
    elif by_folder := labels.folder_labels(names):
        assigned, classes = by_folder
        if classes != sorted(classes):
            notes.sentences.append(_order(classes))

    def ordered() -> str:
        """Where numbers sort as numbers the labels are not those of an order by words."""
        if not notes.sentences:
            return fingerprint()
        return hashlib.sha256(f"{fingerprint()} {classes}".encode()).hexdigest()

    def image(row: int) -> Image.Image:
        return decode(data(row), lambda what: notes.add(what, names[row]))

    def header(row: int) -> Head:
        return head(data(row))

    return Reader(path, names, image, header, ordered, assigned, classes, notes)


def _order(classes: Sequence[str]) -> str:
    """How folders became labels, where their names are numbers."""
    first = ", ".join(f"{label} is {name!r}" for label, name in enumerate(classes[:12]))
    more = f", ..., {len(classes) - 1} is {classes[-1]!r}" if len(classes) > 12 else ""
    return f"labels by folder, numbers in their order and before words: {first}{more}"


def _shown(name: str) -> bool:
    """Whether a file is a picture that is not hidden."""
    return Path(name).suffix.lower() in SUFFIXES and not _hidden(name)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _pictures(names: Iterable[str], path: Path, notes: Notes) -> list[str]:
    """What of `names` are pictures, sorted; the others are counted by kind."""
    pictures = []
    for name in names:
        if _shown(name):
            pictures.append(name)
        elif _hidden(name):
            notes.add("passed over, hidden", name)
        elif name.rpartition("/")[2] != labels.FILE:
            kind = Path(name).suffix.lower() or "files without a suffix"
            notes.add(f"passed over, {kind}", name)
    if not pictures:
        others = f"; {lines[0]}" if (lines := notes.lines()) else ""
        raise ValueError(f"{path} holds no picture ({', '.join(sorted(SUFFIXES))}){others}")
    return sorted(pictures)


def _table(files: Iterable[str], names: Sequence[str], notes: Notes) -> str | None:
    """The dataset.json of the pictures `names`; those of other folders are counted."""
    tables = [name for name in files if name.rpartition("/")[2] == labels.FILE]
    place = labels.place(tables, names)
    for name in tables:
        if name != place:
            notes.add(f"passed over, {labels.FILE} beside no or not all pictures", name)
    return place
