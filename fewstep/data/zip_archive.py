"""Zip files as data: an index that is checked before anything is read; nothing is extracted.

Names that would lead elsewhere, names that occur twice (two readers would see two sets), encrypted
members and links are refused, and so is more than a set of pictures can be: memory and time are
bounded by what the index declares, no member is read beyond its declared size, and no byte of the
file belongs to two members.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from fewstep.data.errors import Problems, Unfit
from fewstep.storage.bounded_reading import overlapping, regular

MEMBERS = 5_000_000
DIRECTORY = 256 << 20
"""Bytes of index, about three million pictures: the index is read whole."""
ENTRY, SPARE = 15, 128 << 20
"""Bytes of memory to a byte of index, and how many may be taken whatever the size of the file: a
file of members without content would fill the memory with their names."""
LOCAL = 30
"""Bytes before the name of a member."""
MEMBER = 64 << 20
"""Bytes of one picture file."""
TOTAL = 2 << 40
RATIO = 200
"""Unpacked bytes to packed ones in members of more than a MiB."""

BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError),
    *(RuntimeError, OverflowError, ValueError),
)
"""What the standard library raises on zip files that are none, or are damaged."""


class ZipArchive:
    """A zip file of which every member has been found fit to be read.

    Raises ValueError where the file is no zip, or names its unfit members. `limit` bounds the
    size of a member, `limits` those of single ones by their name without folders.
    """

    def __init__(
        self, path: Path, limit: int = MEMBER, limits: Mapping[str, int] | None = None
    ) -> None:
        self.path = path
        index, size = _directory(path)
        if index > DIRECTORY:
            raise ValueError(f"{path} has an index of more than {DIRECTORY >> 20} MiB")
        if ENTRY * index > 4 * size + SPARE:
            raise ValueError(
                f"{path} is mostly index: its {size >> 20:,} MiB cannot hold the members of "
                f"{index >> 20:,} MiB of it"
            )
        try:
            self.file = zipfile.ZipFile(path)
        except BROKEN as error:
            raise ValueError(f"{path} is not a sound zip file ({error})") from None
        self.members: dict[str, zipfile.ZipInfo] = {}
        problems, total = Problems(path), 0
        for info in self.file.infolist():
            name = info.orig_filename
            if reason := _unfit(info, (limits or {}).get(name.rpartition("/")[2], limit)):
                problems.add(reason, name)
            elif name in self.members:
                problems.add("there twice", name)
            self.members[name] = info
            total += info.file_size
        problems.refuse()
        if twice := _shared(self.file.infolist(), size):
            problems.add("over bytes of another", twice)
        problems.refuse()
        if len(self.members) > MEMBERS or total > TOTAL:
            raise ValueError(
                f"{path} declares {len(self.members):,} members of {total >> 30:,} GiB in all; "
                f"at most {MEMBERS:,} of {TOTAL >> 30:,} GiB are read"
            )

    def fingerprint(self) -> str:
        """Changes when a member does, by the CRC-32 that the index has of each."""
        total = hashlib.sha256()
        for name, info in self.members.items():
            total.update(f"{name} {info.file_size} {info.CRC}\n".encode())
        return total.hexdigest()

    def read(self, name: str) -> bytes:
        """The content of a member, checked against its size and CRC-32; else `Unfit`."""
        size = self.members[name].file_size
        data = self.head(name, size + 1)
        if len(data) != size:
            raise Unfit("damaged")
        return data

    def head(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a member, or all of them if there are fewer."""
        try:
            with self.file.open(self.members[name]) as member:
                return member.read(count)
        except BROKEN:
            raise Unfit("damaged") from None


def _shared(infos: list[zipfile.ZipInfo], size: int) -> str:
    """The name of a member that shares bytes of the file, of `size` bytes, with another; or ""."""
    spans = ((info.header_offset, LOCAL + info.compress_size) for info in infos)
    index = overlapping(spans, size)
    return "" if index is None else infos[index].orig_filename


def _directory(path: Path) -> tuple[int, int]:
    """Bytes of index that the end of a zip file declares, the most that any reading of it says;
    and of the file."""
    with regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 65_557 - 76))  # a comment of 2^16 - 1, and the zip64 records
        tail = file.read()
    sizes = [0]
    for match in re.finditer(b"PK\x05\x06", tail):
        place = match.start()
        (narrow,) = struct.unpack("<L", tail[place + 12 : place + 16].ljust(4, b"\0"))
        wide = tail[max(0, place - 76) : place]
        if narrow < 2**32 - 1:
            sizes.append(narrow)
        if wide[:4] == b"PK\x06\x06":
            sizes.append(struct.unpack_from("<Q", wide, 40)[0])
    return max(sizes), size


def _unfit(info: zipfile.ZipInfo, limit: int) -> str:
    """Why a member is refused; "" where it is not."""
    name = info.orig_filename
    if info.header_offset < 0:
        return "damaged"
    if re.match(r"/|[A-Za-z]:", name) or "\\" in name or ".." in name.split("/"):
        return "with a path that leads outside"
    if not name or any(not c.isprintable() for c in name):
        return "with control characters in the name"
    if info.flag_bits & 0x1:
        return "encrypted"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by another method than deflate"
    if info.file_size > limit:
        return f"larger than {limit >> 20} MiB"
    if info.file_size > max(1 << 20, RATIO * info.compress_size):
        return f"compressed more than {RATIO} to 1"
    return ""
