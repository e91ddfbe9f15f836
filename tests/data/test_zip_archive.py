"""Zip files and arrays that are ill-made or hostile: refused by name, nothing extracted or run."""

from __future__ import annotations

import os
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.data import zip_archive
from fewstep.data.readers import reader_of
from fewstep.diffusion.model import Model
from fewstep.domains.pictures import Pictures
from fewstep.nets.mlp import MLP
from tests.picture_files import as_npz, as_zip, files, labelled, noise

X = noise(12, 8, 3)
GOOD = files(X)
FIRST = next(iter(GOOD))
WHOLE = GOOD[FIRST]
MODEL = Model(MLP(), (3, 8, 8), 0)


def member(name: str, data: bytes = b"x", **fields: Any) -> Callable[[zipfile.ZipFile], None]:
    """Adds a member under a name that the usual calls would mend."""

    def add(file: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo(name)
        info.filename = name
        for key, value in fields.items():
            setattr(info, key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.writestr(info, data)

    return add


ZEROS = bytes(70 << 20)
MEMBERS: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "up": (member("../a.png"), "1 with a path that leads outside: ../a.png"),
    "inner": (member("a/../../a.png"), "with a path that leads outside: a/../../a.png"),
    "root": (member("/etc/a.png"), "with a path that leads outside: /etc/a.png"),
    "drive": (member("C:/a.png"), "with a path that leads outside: C:/a.png"),
    "back": (member("a\\b.png"), "with a path that leads outside: a\\b.png"),
    "escape": (member("a\x1b[2J.png"), "1 with control characters in the name: a"),
    "twice": (member(FIRST, WHOLE), f"1 there twice: {FIRST}"),
    "link": (member("a.png", external_attr=0o120777 << 16), "1 a link: a.png"),
    "method": (member("a.png", compress_type=zipfile.ZIP_LZMA), "1 compressed by another method"),
    "bomb": (
        member("a.png", ZEROS[: 2 << 20], compress_type=8),
        "1 compressed more than 200 to 1",
    ),
    "large": (member("a.png", ZEROS, compress_type=8), "1 larger than 64 MiB: a.png"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_zip_members_that_are_refused(kind: str, tmp_path: Path) -> None:
    add, words = MEMBERS[kind]
    path = as_zip(tmp_path / "set.zip", GOOD)
    reader_of(path)
    with zipfile.ZipFile(path, "a") as file:
        add(file)
    with pytest.raises(ValueError, match=r"set\.zip cannot be used; ") as caught:
        reader_of(path)
    assert words in str(caught.value)


def test_zip_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_zip(tmp_path / "set.zip", GOOD)
    whole = path.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    entry = whole.index(b"PK\x01\x02")

    def refused(data: bytes, words: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            Pictures(str(path)).source(MODEL, data_free=False)

    def put(place: int, value: bytes) -> bytes:
        return whole[:place] + value + whole[place + len(value) :]

    refused(put(entry + 8, b"\1\0"), f"1 encrypted: {FIRST}")
    refused(put(end + 12, b"\xfe\xff\xff\xff"), "has an index of more than 256 MiB")
    (index,) = struct.unpack_from("<L", whole, end + 16)
    refused(put(end + 16, struct.pack("<L", index + 10)), f"1 damaged: {FIRST}")  # begins at -10
    refused(whole[:end], "is not a sound zip file")
    refused(b"PK\x03\x04", "is not a sound zip file")
    refused(b"", "is not a sound zip file")
    refused(put(entry + 16, b"\0\0\0\0"), f"1 damaged: {FIRST}")  # its CRC-32
    refused(put(entry + 24, struct.pack("<L", len(WHOLE) + 9)), f"1 damaged: {FIRST}")
    monkeypatch.setattr(zip_archive, "MEMBERS", 5)
    refused(whole, "declares 12 members of 0 GiB in all; at most 5 of")


def test_the_index_of_a_large_set_is_bounded_in_zip64_too(tmp_path: Path) -> None:
    record = b"PK\x06\x06" + struct.pack("<Q", 44) + bytes(28) + struct.pack("<QQ", 2**40, 0)
    path = tmp_path / "x.zip"
    end = b"PK\x05\x06" + b"\xff" * 16 + b"\0\0"
    path.write_bytes(bytes(100) + record + bytes(20) + end)
    with pytest.raises(ValueError, match="has an index of more than 256 MiB"):
        reader_of(path)


class Shout:
    """Would touch a file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def test_arrays_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npz"
    objects = np.array([Shout()] * 3, object)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": X}, r"has no array 'images'; it holds x\.npy"),
        ({"images": objects}, "'images' is made of Python objects"),
        ({"images": X, "labels": objects}, "'labels' is made of Python objects"),
        ({"images": X.astype(np.float32)}, "images must be uint8 of shape .* got float32"),
        ({"images": X[:0]}, "holds no pictures; 1 to 5,000,000 are read"),
        ({"images": np.zeros((5_000_001, 1, 1), np.uint8)}, "holds 5000001 pictures; 1 to 5"),
        ({"images": X[0, 0]}, "images must be uint8"),
        ({"images": X[:, :, :, :2]}, "must have 1 or 3 channels"),
        ({"images": X, "labels": np.arange(5)}, r"labels must be 12 integers, .* int64 \(5,\)"),
        ({"images": X, "labels": np.ones(12)}, "labels must be 12 integers, .* float64"),
        ({"images": X, "labels": np.arange(12) - 2}, "2 with a label .*: row 0 .*-2"),
    ]
    for arrays, words in cases:
        as_npz(path, **arrays)
        with pytest.raises(ValueError, match=words):
            reader_of(path)
    head = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (%s,)}"
    for shape in (b"10**9,", b"99999999999,", b"-2,", b"'a',", b"7", b"2, 5, 5"):
        data = (head % shape).ljust(127) + b"\n" + bytes(100)
        as_zip(path, {"images.npy": data})
        with pytest.raises(ValueError, match="'images' is no sound"):
            reader_of(path)
    assert not (tmp_path / "canary").exists()


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    """1,500 zips and .npz with bytes changed, cut or doubled: a set, or a ValueError."""
    rng, path = random.Random(0), tmp_path
    npz = as_npz(tmp_path / "a.npz", images=X, labels=np.arange(12)).read_bytes()
    packed = as_zip(tmp_path / "a.zip", labelled(GOOD, range(12)), 8).read_bytes()
    refused = 0
    for trial in range(1500):
        data = bytearray((npz, packed)[trial % 2])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if trial % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path = tmp_path / f"b{('.npz', '.zip')[trial % 2]}"
        path.write_bytes(data)
        try:
            Pictures(str(path)).source(MODEL, data_free=False)
        except ValueError:
            refused += 1
    assert refused > 1200
