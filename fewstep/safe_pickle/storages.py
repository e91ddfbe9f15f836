"""The bytes of tensors: in nested storage files, and in the members of an archive.

In a plain pickle every storage is a file of torch's oldest format inside a bytes literal: five
small pickles (a magic number, a version, facts of the machine, the storage's description behind
a persistent identifier, the list of identifiers), the number of elements, and the elements. In an
archive (torch.save since 1.6) storages are uncompressed members `data/<number>`.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401 (zipfile would import it while reading)
import io
import struct
import zipfile
import zlib
from typing import Any

from fewstep.safe_pickle.allowed_names import STORAGES, Words
from fewstep.safe_pickle.limits import Budget, UnsafeSnapshotError, require
from fewstep.safe_pickle.records import Global, Storage, whole
from fewstep.safe_pickle.virtual_machine import Machine
from fewstep.storage.bounded_reading import overlapping

MAGIC = 0x1950A86A20F9469CFC6C
FORMAT = 1001


class StorageWords:
    """The vocabulary of a storage file: types of storages, and one identifier."""

    def __init__(self) -> None:
        self.pid: tuple[Any, ...] | None = None

    def name(self, record: Global) -> None:
        """UnsafeSnapshotError unless the name is a storage type."""
        fits = record.module == "torch" and record.name in STORAGES
        require(fits, f"the name {str(record)[:200]!a} is not allowed in a storage")

    def call(self, record: Global, args: tuple[Any, ...]) -> Any:
        """Always an UnsafeSnapshotError: a storage file has no calls."""
        raise UnsafeSnapshotError("a call in a storage")

    new = call

    def fill(self, target: Any, state: Any) -> None:
        """Always an UnsafeSnapshotError: a storage file has no objects with state."""
        raise UnsafeSnapshotError("contents in a storage")

    def persistent(self, pid: Any) -> Any:
        """Check and keep the one identifier of the file; UnsafeSnapshotError for a second."""
        require(self.pid is None, "a second storage in a storage")
        check_identifier(pid)
        require(len(pid) == 5 or pid[5] is None, "a view of a storage in a storage")
        self.pid = pid
        return pid


def check_identifier(pid: Any) -> None:
    """("storage", a storage type, key, place, number of elements), and an optional view."""
    require(type(pid) is tuple and len(pid) in (5, 6), "an identifier is not of five parts")
    kind, storage, key, _, count = pid[:5]
    require(type(kind) is str and kind == "storage", "an identifier is of no storage")
    fits = type(storage) is Global and storage.module == "torch" and storage.name in STORAGES
    require(fits and type(key) is str, "an identifier names no storage")
    require(whole(count) and 0 <= count < 1 << 48, "a storage's size is no size")


def nested(view: memoryview, budget: Budget) -> Storage:
    """The storage that a bytes literal holds."""
    position, words = 0, StorageWords()

    def part() -> Any:
        nonlocal position
        machine = Machine(view, position, words, budget)
        result = machine.run()
        position = machine.position
        return result

    magic, version, facts = part(), part(), part()
    numbers = whole(magic) and whole(version)
    require(numbers and (magic, version) == (MAGIC, FORMAT), "a storage of another format")
    little = type(facts) is dict and facts.get("little_endian") is True
    require(little, "a storage is not little-endian")
    pid, keys = part(), part()
    if words.pid is None or pid is not words.pid:
        raise UnsafeSnapshotError("a storage describes something else")
    named = type(keys) is list and len(keys) == 1 and type(keys[0]) is str and keys[0] == pid[2]
    require(named, "a storage lists other keys")
    require(len(view) - position >= 8, "a storage ends before its size")
    (count,) = struct.unpack("<q", view[position : position + 8])
    dtype, content = STORAGES[pid[1].name], view[position + 8 :]
    fits = count == pid[4] and len(content) == count * dtype.itemsize
    require(fits, "a storage is not of the size it says")
    return Storage(dtype, content)


class TensorArchive:
    """A torch.save archive in memory, whose members are views of it."""

    def __init__(self, data: bytes, budget: Budget) -> None:
        self.budget = budget
        self.data = memoryview(data)
        self.found: dict[str, Storage] = {}
        count = data.count(b"PK\1\2")
        require(count <= budget.limits.zip_members, f"an archive of {count} members")
        infos = _members(data)
        self.infos = {info.filename: info for info in infos}
        require(len(self.infos) == len(infos), "an archive with a member twice")
        pickles = [name for name in self.infos if name.endswith("/data.pkl")]
        require(len(pickles) == 1, "an archive without one data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        stored = all(i.compress_type == zipfile.ZIP_STORED and not i.flag_bits & 1 for i in infos)
        require(stored, "an archive with compressed or locked members")
        require(all(n.startswith(self.root) for n in self.infos), "an archive with a stray member")
        spans = ((info.header_offset, 30 + info.compress_size) for info in infos)
        require(overlapping(spans, len(data)) is None, "an archive with members over each other")
        if f"{self.root}byteorder" in self.infos:
            require(
                bytes(self.member("byteorder")) == b"little", "an archive is not little-endian"
            )

    def member(self, name: str) -> memoryview:
        """The contents of a member below the root, its checksum verified."""
        info = self.infos.get(self.root + name)
        if info is None:
            raise UnsafeSnapshotError(f"the archive has no member {name[:80]}")
        start = info.header_offset
        require(0 <= start <= len(self.data) - 30, f"member {name[:80]} starts outside the file")
        magic, *_, name_size, extra_size = struct.unpack("<4s22x2H", self.data[start : start + 30])
        start += 30 + name_size + extra_size
        view = self.data[start : start + info.file_size]
        intact = magic == b"PK\3\4" and len(view) == info.file_size == info.compress_size
        require(intact and zlib.crc32(view) == info.CRC, f"member {name[:80]} is damaged")
        return view

    def fetch(self, pid: Any) -> Storage:
        """The storage of a persistent identifier."""
        check_identifier(pid)
        _, kind, key, _, count = pid[:5]
        require(len(pid) == 5 and key.isdigit() and len(key) < 10, "a storage's key is no number")
        if key not in self.found:
            content = self.member(f"data/{key}")
            self.found[key] = Storage(STORAGES[kind.name], content)
        storage = self.found[key]
        size = count * storage.dtype.itemsize
        fits = storage.dtype == STORAGES[kind.name] and len(storage.view) == size
        require(fits, "a storage is not of the type and size it says")
        return storage


_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    OSError,
    EOFError,
    struct.error,
)


def _members(data: bytes) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except _ZIP_ERRORS as error:
        raise UnsafeSnapshotError(f"the archive cannot be read ({str(error)!a})") from None


def words_of_pickle(budget: Budget) -> Words:
    """The vocabulary of a plain pickle: storages inside."""
    return Words(budget, lambda view: nested(view, budget), None)


def words_of_archive(archive: TensorArchive) -> Words:
    """The vocabulary of an archive's pickle: storages outside."""
    return Words(archive.budget, None, archive.fetch)
