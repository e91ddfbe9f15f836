"""Files of strangers, read within bounds: what a file may cost is decided before it is spent.

Regular files alone are opened, so that no device, pipe or socket is waited for; sizes are compared
with a limit before anything is read, and the number of values with another before JSON is parsed.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

HEADER = 8 << 20
"""Bytes of the header of a safetensors file, about eighty thousand tensors."""
HEADER_VALUES = 1_000_000


def regular(path: Path) -> BinaryIO:
    """`path`, opened for reading; ValueError, without any waiting, where it is no regular file."""
    _refuse_others(path, path.stat().st_mode)  # a socket cannot be opened at all
    # NONBLOCK: what was a file a moment ago could be a pipe by now
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        _refuse_others(path, os.fstat(number).st_mode)
    except ValueError:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def _refuse_others(path: Path, mode: int) -> None:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    if not stat.S_ISREG(mode):
        kind = next((name for name, fits in kinds.items() if fits(mode)), "device")
        raise ValueError(f"{path} is a {kind}, not a regular file")


def size_of(path: Path) -> int:
    """Bytes of a regular file; ValueError where it is none."""
    with regular(path) as file:
        return os.fstat(file.fileno()).st_size


def content(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes; ValueError where it is none."""
    with regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} is larger than {in_words(limit)}")
        return file.read(size)


def in_words(size: int) -> str:
    """ "256 MiB"; bytes below one MiB are given as such."""
    return f"{size >> 20:,} MiB" if size >= 1 << 20 else f"{size:,} bytes"


def json_value(data: bytes | str, values: int) -> Any:
    """The value of a JSON text; ValueError where it is none, repeats a key or has too many values.

    A list of empty lists takes thirty times its size in memory, so at most `values` values are
    parsed. A byte order mark is passed over.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    if sum(map(text.count, "[{,")) > values:
        raise ValueError(f"it holds more than {values:,} values")
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys is there twice: of two values one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:80]!r} is there twice; keep one")
    return found


def overlapping(spans: Iterable[tuple[int, int]], size: int) -> int | None:
    """Which of (start, length) in a file of `size` bytes begins within another or ends outside.

    None where all lie side by side: then to read each once costs no more than the file.
    """
    placed = sorted((start, length, index) for index, (start, length) in enumerate(spans))
    end = 0
    for start, length, index in placed:
        if start < end or start + length > size:
            return index
        end = start + length
    return None


def tensors_header(path: Path) -> None:
    """A ValueError unless the header of a safetensors file is of a size it can be.

    And unless each name is there once: safetensors itself would take the last. All else is its
    own to check.
    """
    with regular(path) as file:
        most = min(os.fstat(file.fileno()).st_size - 8, HEADER)
        told = file.read(8)
        if len(told) < 8:
            raise ValueError("it has no header")
        (header,) = struct.unpack("<Q", told)
        if header > most:
            raise ValueError(f"its header would be of {header:,} bytes; at most {most:,} are read")
        json_value(file.read(header), HEADER_VALUES)
