"""Reading of untrusted files within bounds on size and number of values.

Regular files alone are opened, so that no device, pipe or socket is waited for; sizes are compared
with a limit before anything is read, and the number of values with another before JSON is parsed.
"""

from __future__ import annotations

import json
import math
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
VALUES = 4_000_000
"""Values of a JSON text, where its reader knows no lower bound."""
DEEPEST, DIGITS = 64, 64
"""Levels of nesting and digits of a number that a JSON text has at most."""


def regular(path: Path) -> BinaryIO:
    """`path`, opened for reading; ValueError, without any waiting, unless it is a regular file."""
    _refuse_others(path, path.stat().st_mode)  # a socket cannot be opened at all
    # NONBLOCK: what was a file a moment ago could be a pipe by now
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        facts = os.fstat(number)
        _refuse_others(path, facts.st_mode)
        if not facts.st_size and not _readable(number):
            raise ValueError(f"{path} is a file of the system that cannot be read")
    except ValueError:
        os.close(number)
        raise
    return os.fdopen(number, "rb")


def _readable(number: int) -> bool:
    """Whether a file without size has a first byte or an end; /proc/self/mem has neither."""
    try:
        os.pread(number, 1, 0)
    except OSError:
        return False
    return True


def _refuse_others(path: Path, mode: int) -> None:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    if not stat.S_ISREG(mode):
        kind = next((name for name, fits in kinds.items() if fits(mode)), "device")
        raise ValueError(f"{path} is a {kind}, not a regular file")


def size_of(path: Path) -> int:
    """Bytes of a regular file; ValueError for anything else."""
    with regular(path) as file:
        return os.fstat(file.fileno()).st_size


def content(path: Path, limit: int) -> bytes:
    """The whole of a regular file; ValueError for anything else, or more than `limit` bytes."""
    with regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} is larger than {in_words(limit)}")
        return file.read(size)


def in_words(size: int) -> str:
    """A size as text, such as "256 MiB"; below one MiB in bytes."""
    return f"{size >> 20:,} MiB" if size >= 1 << 20 else f"{size:,} bytes"


def json_value(data: bytes | str, values: int = VALUES, finite: bool = False) -> Any:
    """The value of a JSON text that may be anybody's; bytes are UTF-8.

    Arguments:
        data: the text; a byte order mark is passed over.
        values: how many values it has at most. The limit holds before parsing, since a list of
            empty lists takes thirty times its size in memory.
        finite: refuse NaN and infinity, written so or by a large exponent, or too many digits.
    Raises ValueError where it is no JSON, has more values, more than `DEEPEST` levels, numbers of
    more than `DIGITS` digits (infinity, unless `finite`), or a key twice in one object.
    """

    def real(text: str) -> float:
        value = float(text) if len(text) <= DIGITS else math.inf
        if finite and not math.isfinite(value):
            raise ValueError(f"the number {text[:20]} is not finite, or too long")
        return value

    def whole(text: str) -> float:
        return int(text) if len(text) <= DIGITS else real(text)

    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    if sum(map(text.count, "[{,")) > values:
        raise ValueError(f"it holds more than {values:,} values")
    try:
        value = json.loads(
            text,
            parse_float=real,
            parse_int=whole,
            parse_constant=real,
            object_pairs_hook=distinct,
        )
        deep = _levels(value) > DEEPEST
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def _levels(value: Any) -> int:
    """How deep lists and objects are nested, as far as `DEEPEST` + 1."""
    levels, layer = 0, [value]
    while levels <= DEEPEST:
        layer = [v for v in layer if isinstance(v, (dict, list))]
        if not layer:
            break
        layer = [
            v for inner in layer for v in (inner.values() if isinstance(inner, dict) else inner)
        ]
        levels += 1
    return levels


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key is there twice, since one value would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:80]!r} is there twice; keep one")
    return value


def overlapping(spans: Iterable[tuple[int, int]], size: int) -> int | None:
    """The index of the first (start, length) that begins within another or ends outside the file.

    size: bytes of the file. None where all lie side by side: then to read each once costs no more
    than the file.
    """
    placed = sorted((start, length, index) for index, (start, length) in enumerate(spans))
    end = 0
    for start, length, index in placed:
        if start < end or start + length > size:
            return index
        end = start + length
    return None


def tensors_header(path: Path) -> None:
    """ValueError unless the header of a safetensors file has a plausible size and distinct names.

    safetensors itself would take the last of two tensors of one name; it checks all else.
    """
    with regular(path) as file:
        most = min(os.fstat(file.fileno()).st_size - 8, HEADER)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("it has no header")
        (header,) = struct.unpack("<Q", prefix)
        if header > most:
            raise ValueError(f"its header would be of {header:,} bytes; at most {most:,} are read")
        json_value(file.read(header), HEADER_VALUES)
