"""Files that ask for all of the memory or the time, or for what is not theirs: 40 kinds of them.

A `Case` writes its files into an empty folder and says how a person would hand them to fewstep.
`tests/measure_hostile_files.py` runs them one after the other and measures what each cost.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hostile_files import archive
from tests.pickle_assembler import (
    Raw,
    call,
    data,
    module,
    network,
    pickled,
    storage,
    tensor,
    value,
)
from tests.picture_files import array, as_bytes, as_folder, encoded, files, noise

Content = bytes | Callable[[], bytes]
"""Of a file, or what makes it, which is called when the file is written."""
Entry = tuple[str, ...]
"""Words of the command line, or ("prompts" | "captions" | "reference" | "state", path)."""


@dataclass(frozen=True)
class Case:
    """A stranger's file, and how it is handed over."""

    kind: str
    name: str
    make: Callable[[Path], Entry]
    fits: bool | None = False
    """Whether it must be taken (the controls), must be refused, or may be either."""


X = noise(3, 8, 3)
GOOD = files(X)
FIRST = next(iter(GOOD))
PNG = GOOD[FIRST]


def _one(kind: str, name: str, content: Content, *words: str, fits: bool | None = False) -> Case:
    """A file that is handed over by `words`, in which FILE stands for it."""

    def make(home: Path) -> Entry:
        path = home / words[0]
        path.write_bytes(content() if callable(content) else content)
        return tuple(str(path) if word == "FILE" else word for word in words[1:])

    return Case(kind, name, make, fits)


def _folder(home: Path, content: Mapping[str, Content]) -> str:
    made = {name: part() if callable(part) else part for name, part in content.items()}
    return str(as_folder(home / "set", made))


def _set(kind: str, name: str, content: Mapping[str, Content], fits: bool | None = False) -> Case:
    """A folder of pictures."""

    def make(home: Path) -> Entry:
        return "data", "check", _folder(home, content), "--sheet", "sheet.png"

    return Case(kind, name, make, fits)


def _inspect(kind: str, name: str, content: Content, fits: bool | None = False) -> Case:
    return _one(kind, name, content, "x.pkl", "inspect", "FILE", fits=fits)


def _zip(kind: str, name: str, content: Content, fits: bool | None = False) -> Case:
    return _one(kind, name, content, "x.zip", "data", "check", "FILE", fits=fits)


# pickles

KEPT, AGAIN = b"q\1", Raw(b"h\1")


def _again(count: int, size: int) -> list[Raw]:
    """One text, and references to it."""
    return [Raw(value("a" * size) + KEPT), *[AGAIN] * count]


def _pickles() -> Iterator[Case]:
    for count, size in ((9_000, 500_000), (9_000, 5_000), (900, 3_000_000), (99, 1 << 22)):
        many, name = _again(count, size), f"{count} of {size}"
        known = {f"k{i}": part for i, part in enumerate(many)}
        yield _inspect("one text many times", f"a list, {name}", pickled({"a": many}), None)
        yield _inspect("one text many times", f"a dictionary, {name}", pickled({"a": known}), None)
        kwargs = network({"w": tensor()}, _init_kwargs=known)
        yield _inspect("one text many times", f"arguments, {name}", pickled({"ema": kwargs}))
        listed = network({"w": tensor()}, _init_args=Raw(value(tuple(many))))
        yield _inspect("one text many times", f"unnamed, {name}", pickled({"ema": listed}))
    key = Raw(value("k" * 500) + KEPT)
    dicts = [{"a": {key: 0}}, *[Raw(b"}h\1K\0s")] * 9_000]
    yield _inspect(
        "one text many times", "keys", pickled({f"e{i}": dicts for i in range(90)}), None
    )
    sources = Raw(value("#" * 4_000_000) + KEPT)
    objects = {f"o{i}": module({}, module_src=AGAIN if i else sources) for i in range(90)}
    yield _inspect("one text many times", "sources", pickled(objects))
    for opening, closing, name in ((b"]", b"a", "lists"), (b"", b"\x85", "tuples")):
        for depth in (100, 10_000, 400_000):
            code = b"\x80\4}" + value("a") + opening * depth + b"N" + closing * depth + b"s."
            yield _inspect("nesting", f"{name}, {depth}", code, None)
    for depth in (100, 10_000):
        deep = b"}" + value("k") * 1
        code = b"\x80\4}" + value("a") + deep * depth + b"N" + b"s" * depth + b"s."
        yield _inspect("nesting", f"dictionaries, {depth}", code, None)
        yield _inspect("nesting", f"marks, {depth}", b"\x80\4" + b"(" * depth + b".")
    for levels in (20, 40, 5_000):
        double = b"".join(b"](h" + bytes([i % 200]) + b"h" + bytes([i % 200]) + b"e" + b"q"
                          + bytes([(i + 1) % 200]) + b"0" for i in range(levels))  # fmt: skip
        code = b"\x80\4](Ne" + b"q\0" + b"0" + double + b"}" + value("a")[:-2] + b"h"
        code += bytes([levels % 200]) + b"s."
        yield _inspect("doubling", f"lists, {levels}", code, None)
    for size in (33, 255):
        yield _inspect(
            "large integers", f"{size} bytes", b"\x80\2\x8a" + bytes([size]) + b"\1" * size + b"."
        )
    for size in (1 << 31, (1 << 31) - 1, 1_000_000):
        code = b"\x80\2\x8b" + struct.pack("<I", size) + b"\1" * 1000 + b"."
        yield _inspect("large integers", f"LONG4 of {size}", code)
    yield _inspect("large integers", "digits", b"\x80\2L" + b"9" * 1_000_000 + b"L\n.")
    for code, layout in (
        (b"X", "<I"),
        (b"\x8d", "<Q"),
        (b"B", "<I"),
        (b"\x8e", "<Q"),
        (b"\x96", "<Q"),
    ):
        for size in (100, 1 << 30, (1 << 8 * struct.calcsize(layout)) - 1):
            lie = b"\x80\4}" + value("a") + code + struct.pack(layout, size) + b"aaaa" + b"s."
            yield _inspect("lengths that lie", f"{code!r} of {size}", lie)
    for name, part in FLOODS.items():
        for count in (150_000, 999_000):
            yield _inspect("floods", f"{name}, {count}", b"\x80\4}" + part * count + b".", None)


FLOODS = {
    "dictionaries": b"}",
    "sets": b"\x8f",
    "lists in one": b"]a",
    "tuples": b")",
    "memo": b"\x94",
    "marks": b"(",
    "doubled": b"2",
    "frames": b"\x95" + bytes(8),
    "numbers": b"K\1",
    "floats": b"G" + bytes(8),
    "texts": b"\x8c\3abc",
    "wide texts": b"\x8c\4\xf0\x9f\x98\x80",
    "blobs": b"C\0",
}


def _tensors() -> Iterator[Case]:
    store = Raw(storage().code + KEPT)

    def many(count: int, *geometry: Any) -> bytes:
        parts = {f"w{i}": tensor(AGAIN if i else store, *geometry) for i in range(count)}
        return pickled({"ema": network(parts)})

    for count in (5_000, 60_000):
        yield _inspect("tensors", f"views, {count}", partial(many, count), None)
        yield _inspect(
            "tensors", f"empty, {count}", partial(many, count, 0, (0, 1 << 39), (1, 1)), None
        )
    for shape, stride in (((1 << 30,), (0,)), ((1 << 39,) * 3, (0, 0, 0)), ((4, 1 << 39), (1, 0))):
        yield _inspect("tensors", f"repeats {shape}", many(2, 0, shape, stride))
    big = Raw(storage(bytes(1 << 20), count=1 << 18).code + KEPT)
    load = call("torch.storage", "_load_from_bytes", data(b"")).code[: -len(data(b"").code) - 2]
    blob = Raw(big.code[len(load) :][: -len(KEPT) - 2] + KEPT)
    again = [Raw(load + (blob.code if i == 0 else b"h\1") + b"tR") for i in range(5_000)]
    lots = {f"w{i}": tensor(one, 0, (1 << 18,)) for i, one in enumerate(again)}
    yield _inspect("tensors", "one storage, 5,000 times", pickled({"ema": network(lots)}))
    yield _inspect("tensors", "storages that nobody uses", pickled({"a": again}), None)
    shared = Raw(value(network({"n" * 500: tensor()})) + KEPT)
    for count in (1_000, 90_000):
        yield _inspect("names", f"{count} long names", partial(_named, shared, count), None)
    for old in (b"", b"\x80\2\x8a\n" + struct.pack("<Q", 5), pickled(0x1950A86A20F9469CFC6C, 2)):
        for more in (
            b"",
            pickled(1001, 2),
            pickled(1001, 2) + pickled({"little_endian": True}, 2),
        ):
            name = f"{len(old)} and {len(more)}"
            yield _one("older files of torch", name, old + more, "x.pth", "state", "FILE")


def _named(shared: Raw, count: int) -> bytes:
    """A network that has one module under many long names."""
    kids = {f"{i:05}" + "m" * 400: AGAIN if i else shared for i in range(count)}
    return pickled({"ema": network({}, kids)})


# archives and zip files


def _raw_zip(entries: list[tuple[bytes, int, int, bytes, int]], end: bytes = b"") -> bytes:
    """A zip of (name, declared size, method, body, entries of the index over it)."""
    body, index, count = bytearray(), bytearray(), 0
    for name, size, method, content, times in entries:
        crc, place = zlib.crc32(content), len(body)
        common = struct.pack("<4H3L", 0, method, 0, 0, crc, len(content), size)
        body += (
            b"PK\3\4" + struct.pack("<H", 20) + common + struct.pack("<2H", len(name), 0) + name
        )
        body += content
        for i in range(times):
            other = name if i == 0 else name[:-4] + f"{i:06}".encode() + name[-4:]
            index += b"PK\1\2" + struct.pack("<2H", 20, 20) + common
            index += struct.pack("<5H2L", len(other), 0, 0, 0, 0, 0, place) + other
            count += 1
    told = min(count, 0xFFFF)
    last = struct.pack("<4H2LH", 0, 0, told, told, len(index), len(body), 0)
    return bytes(body + index) + (end or b"PK\5\6" + last)


def _member(name: str, content: bytes = b"x", **fields: Any) -> bytes:
    """A set of pictures with one more member, under a name that the usual calls would mend."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, picture in GOOD.items():
            file.writestr(key, picture)
        info = zipfile.ZipInfo("x")
        info.filename = name
        for key, of in fields.items():
            setattr(info, key, of)
        file.writestr(info, content)
    return out.getvalue()


def _deflated(size: int, fill: bytes = b"\0") -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [squeeze.compress(fill * (1 << 20)) for _ in range(size >> 20)]
    return b"".join(parts) + squeeze.flush()


def _bomb(name: bytes, megabytes: int, told: int) -> bytes:
    """A zip of one member of zeros, which it says are `told` MiB."""
    return _raw_zip([(name, told << 20, 8, _deflated(megabytes << 20), 1)])


def _squeezed(name: bytes, megabytes: int, count: int = 1) -> bytes:
    """A picture, and members that unpack to as much as is not yet refused."""
    part, first = _thin(megabytes << 20), (b"0.png", len(PNG), 0, PNG, 1)
    names = [name % i for i in range(count)] if b"%" in name else [name]
    return _raw_zip([first, *((each, megabytes << 20, 8, part, 1) for each in names)])


def _archives() -> Iterator[Case]:
    body = os.urandom(1 << 20)
    for count in (2, 2_000, 20_000):
        many = _raw_zip([(b"a/data/.bin", 1 << 20, 0, body, count)])
        yield _inspect("members over one body", f"inspect, {count}", many)
        yield _one("members over one body", f"state, {count}", many, "x.pth", "state", "FILE")
        pictures = _raw_zip([(b"a/b.png", len(PNG), 0, PNG, count)])
        yield _zip("members over one body", f"pictures, {count}", pictures)
        yield _one(
            "members over one body", f"npz, {count}", pictures, "x.npz", "reference", "FILE"
        )
    inner = _raw_zip([(b"b.png", len(PNG), 0, PNG, 1)])
    shift = inner.index(b"PK\1\2")
    nested = _raw_zip([(b"a.png", shift, 0, inner[:shift], 1), (b"c.png", len(PNG), 0, PNG, 1)])
    entry = bytearray(inner[shift : inner.index(b"PK\5\6")])
    entry[42:46] = struct.pack("<L", 35)  # a member that begins within another
    cut = nested.index(b"PK\5\6")
    index = nested[nested.index(b"PK\1\2") : cut] + bytes(entry)
    end = struct.pack("<4H2LH", 0, 0, 3, 3, len(index), nested.index(b"PK\1\2"), 0)
    inside = nested[: nested.index(b"PK\1\2")] + index + b"PK\5\6" + end
    yield _zip("members over one body", "one within another", inside)
    for size in (1 << 31, (1 << 32) - 1, 65 << 20):
        for method in (0, 8):
            lie = _raw_zip([(b"a.png", size, method, PNG, 1)])
            yield _zip("declared sizes", f"{size} by {method}", lie)
            yield _inspect("declared sizes", f"inspect, {size} by {method}", lie)
    for megabytes, told in itertools.product((2, 63, 500), (1, 0)):
        name = f"{megabytes} MiB" + " that says 1" * (not told)
        bomb = partial(_bomb, b"a.png", megabytes, megabytes if told else 1)
        yield _zip("deflate bombs", name, bomb)
        bomb = partial(_bomb, b"mu.npy", megabytes, megabytes if told else 1)
        yield _one("deflate bombs", f"array, {name}", bomb, "x.npz", "reference", "FILE")
    yield _zip("deflate bombs", "eight at 190 to 1", partial(_squeezed, b"a%d.png", 60, 8))
    yield _zip("deflate bombs", "labels at 190 to 1", partial(_squeezed, b"dataset.json", 250))
    for count in (1_000, 50_000):
        empty = [(b"a.png", len(PNG), 0, PNG, 1), (b"e.txt", 0, 0, b"", count)]
        yield _zip("floods of members", f"over one place, {count}", partial(_raw_zip, empty))
        flood = partial(as_bytes, dict.fromkeys(map(str, range(count)), b""))
        yield _zip("floods of members", f"side by side, {count}", flood)
        yield _inspect("floods of members", f"inspect, {count}", flood)
    for depth in (1, 5):
        whole = as_bytes(GOOD)
        for _ in range(depth):
            whole = as_bytes({"a.zip": whole})
        yield _zip("zips in zips", f"{depth}", whole)
        yield _inspect("zips in zips", f"inspect, {depth}", whole)
    for size, count in ((1 << 62, 1), (10, 1 << 60), (1 << 63, 1 << 63)):
        wide = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, 0)
        lie = (
            PNG + wide + b"PK\6\7" + struct.pack("<LQL", 0, len(PNG), 1) + b"PK\5\6" + b"\xff" * 16
        )
        yield _zip("zip64 that lies", f"{size} and {count}", lie + b"\0\0")
        yield _inspect("zip64 that lies", f"inspect, {size} and {count}", b"PK" + lie + b"\0\0")
    names = (
        "../a.png",
        "/etc/a.png",
        "C:/a.png",
        "a/../../b.png",
        "a\\b.png",
        "a\x1b[2J.png",
        "a\0.png",
    )
    for name in names:
        yield _zip("names that lead outside", repr(name), _member(name))
    for target in ("/etc/passwd", "../..", "x" * 5_000):
        link = _member("a.png", target.encode(), external_attr=0o120777 << 16)
        yield _zip("links in zips", target[:20], link)
    for again in (FIRST, "00000/img00000002.png"):
        yield _zip("names that are there twice", again, _member(again, PNG))
    yield _inspect(
        "names that are there twice",
        "archive",
        archive(lambda m: m.update({"archive/version#": b"3"})),
    )
    for method in (1, 6, 9, 12, 14, 93, 99):
        yield _zip("methods", f"{method}", _raw_zip([(b"a.png", len(PNG), method, PNG, 1)]))
    whole = as_bytes(GOOD)
    for part in range(1, 8):
        yield _zip("zips cut short", f"{part} of 8", whole[: len(whole) * part // 8])
        cut_archive = archive()[: len(archive()) * part // 8]
        yield _inspect("zips cut short", f"archive, {part} of 8", cut_archive)
    yield _zip("controls", "a zip of pictures", whole, True)
    yield _inspect("controls", "an archive", archive(), True)
    yield _inspect("controls", "a pickle", pickled({"ema": network({"w": tensor()})}), True)


def _thin(size: int) -> bytes:
    """Deflated bytes that unpack to `size`, just below what is refused as a bomb."""
    part = os.urandom(size // 190 // 64)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    gap, out = size // 64 - len(part), b""
    for _ in range(64):
        out += squeeze.compress(part + bytes(gap))
    return out + squeeze.compress(bytes(size - 64 * (gap + len(part)))) + squeeze.flush()


# pictures


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">L", zlib.crc32(kind + content))
    return struct.pack(">L", len(content)) + kind + content + crc


def png(
    width: int, height: int, pixels: bytes = b"", *more: bytes, depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG that declares a size, whatever its pixels are; `more` chunks before them."""
    head = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = _chunk(b"IHDR", head), *more, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _flat(side: int, colour: int, channels: int) -> bytes:
    """A black square as PNG, made without holding it."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + channels * side)
    parts = [squeeze.compress(row * 64) for _ in range(side // 64)]
    return png(side, side, b"".join(parts) + squeeze.flush(), colour=colour)


def _saved(mode: str, form: str, size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form, **options)
    return buffer.getvalue()


def _scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    whole = _saved("L", "JPEG", (side, side), progressive=True, quality=50)
    start = whole.rindex(b"\xff\xda")
    return whole[:start] + whole[start:-2] * count + b"\xff\xd9"


def _exif(*entries: tuple[int, int, int, bytes], next_: int = 0) -> bytes:
    """EXIF data of (tag, type, count, four bytes)."""
    rows = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    return (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + rows
        + struct.pack("<L", next_)
    )


def _pictures() -> Iterator[Case]:
    def picture(
        kind: str, name: str, content: Content, suffix: str = "png", fits: bool | None = False
    ) -> Case:
        return _set(kind, name, {f"a.{suffix}": content}, fits)

    for width, height in (
        (40_000, 40_000),
        (2**31 - 1, 2**31 - 1),
        (9_000, 9_000),
        (1, 2**31 - 1),
        (0, 8),
    ):
        yield picture(
            "PNG bombs", f"declares {width}x{height}", png(width, height, zlib.compress(b""))
        )
    for side, colour, channels in ((3_008, 2, 3), (3_008, 6, 4), (6_016, 6, 4), (8_192, 2, 3)):
        flat = partial(_flat, side, colour, channels)
        name = f"flat {side}, {channels} channels"
        yield picture("PNG bombs", name, flat, fits=None)
        many = {f"{i}.png": flat for i in range(6)}
        yield _set("PNG bombs", f"six {name}", many, None)

        def pack(home: Path, many: Mapping[str, Content] = many) -> Entry:
            out = str(home / "x.zip")
            return "data", "pack", _folder(home, many), out, "--resolution", "16"

        yield Case("PNG bombs", f"packed, six {name}", pack, None)
    black = zlib.compress(bytes(4 << 20), 9)
    for kind, start in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        for count in (1, 40):
            text = _chunk(kind, start + black)
            pixels = zlib.compress(bytes(8 * 25))
            yield picture(
                "PNG chunks", f"{kind!r} {count}", png(8, 8, pixels, *[text] * count), fits=None
            )
    tiny = _chunk(b"tEXt", b"a\0b")
    yield picture(
        "PNG chunks", "100,000", png(8, 8, zlib.compress(bytes(200)), *[tiny] * 100_000), fits=None
    )
    for side in (2_048, 6_000, 9_000):
        yield picture(
            "JPEG bombs", f"flat {side}", partial(_saved, "RGB", "JPEG", (side, side)), "jpg", None
        )
    for count, side in ((150, 256), (2_000, 1_024), (20_000, 3_000)):
        yield picture(
            "JPEG bombs", f"{count} scans of {side}", partial(_scans, count, side), "jpg", None
        )
    lie = bytearray(_saved("RGB", "JPEG"))
    place = lie.index(b"\xff\xc0")
    lie[place + 5 : place + 9] = b"\xff\xdc\xff\xdc"
    yield picture("JPEG bombs", "declares 65,500 squared", bytes(lie), "jpg")
    for lossless in (True, False):
        for side in (3_000, 8_000):
            flat = partial(_saved, "RGB", "WEBP", (side, side), lossless=lossless, method=0)
            yield picture("WebP bombs", f"flat {side} {lossless}", flat, "webp", None)
        yield picture("WebP bombs", f"wide {lossless}", _wide_webp(lossless), "webp")
    for form in ("GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PCX"):
        yield picture(
            "other formats", f"{form} as PNG", _saved("RGB" if form != "GIF" else "P", form)
        )
        yield _set(
            "other formats",
            f"{form} beside",
            {**GOOD, f"b.{form.lower()}": _saved("RGB" if form != "GIF" else "P", form)},
            True,
        )
    whole = {"png": encoded(X[0]), "jpg": encoded(X[0], "JPEG"), "webp": encoded(X[0], "WEBP")}
    for suffix, content in whole.items():
        for part in (1, 3, 5, 7):
            cut = content[: len(content) * part // 8]
            yield picture(
                "pictures cut short",
                f"{suffix}, {part} of 8",
                cut,
                suffix,
                fits=None if suffix == "jpg" else False,
            )
        yield picture("controls", f"a {suffix}", content, suffix, True)
    for mode, form in itertools.product(
        ("1", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"),
        ("PNG", "JPEG", "WEBP"),
    ):
        try:
            content = _saved(mode, form)
        except (OSError, KeyError, ValueError):
            continue
        yield picture("modes", f"{mode} {form}", content, form.lower(), None)
    frames = [Image.fromarray(x) for x in X]
    for form, count in itertools.product(("PNG", "WEBP", "GIF"), (3, 300)):
        buffer = io.BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=(frames * count)[1:count])
        yield picture(
            "animations",
            f"{form} of {count}",
            buffer.getvalue(),
            form.lower(),
            None if form != "GIF" else False,
        )
    for name, exif in _orientations().items():
        for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
            yield picture("EXIF", f"{name}, {form}", encoded(X[0], form, exif=exif), suffix, True)


def _wide_webp(lossless: bool) -> bytes:
    """A WebP that declares the largest canvas, of no content."""
    if lossless:
        inner = b"VP8L" + struct.pack("<L", 5) + b"\x2f" + struct.pack("<L", 0x0FFFFFFF) + b"\0"
    else:
        inner = b"VP8X" + struct.pack("<L", 10) + b"\2\0\0\0" + b"\xfe\x3f\0" * 2
        inner += b"ANIM" + struct.pack("<L", 6) + bytes(6)
    return b"RIFF" + struct.pack("<L", len(inner) + 4) + b"WEBP" + inner


def _orientations() -> dict[str, bytes]:
    turn = 0x0112
    return {
        "none": _exif(),
        "nine": _exif((turn, 3, 1, b"\x09\0\0\0")),
        "text": _exif((turn, 2, 4, b"abc\0")),
        "many": _exif((turn, 3, 1 << 30, b"\6\0\0\0")),
        "fraction": _exif((turn, 5, 1, b"\x08\0\0\0")),
        "itself": _exif((turn, 3, 1, b"\6\0\0\0"), next_=8),
        "inner": _exif((0x8769, 4, 1, b"\x08\0\0\0"), (turn, 3, 1, b"\1\0\0\0")),
        "60,000 tags": _exif(*[(i, 3, 1, b"\1\0\0\0") for i in range(1, 4_000)]),
        "junk": b"Exif\0\0" + b"\xff" * 500,
    }


# arrays


def _npy(shape: str, descr: str = "'|u1'", body: bytes = bytes(100)) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text + b"\n" + body


SHAPES = ("(10**9,)", "(99999999999,)", "(2**62, 2**62)", "(-2,)", "('a',)", "7", "(2, 5, 5, 5)",
          "(0, 8, 8)", "(1099511627776, 0)", "(1,)*40", "()", "(1e3,)", "(True, 100)")  # fmt: skip
DESCRS = ("'|O'", "'|V0'", "'|S0'", "[('a', '|O')]", "'<f4'", "'<U25'", "[('a', '|u1')]*1",
          "'" + "(" * 2_000 + "'", "9", "'|u1\\0'", "'<M8[s]'")  # fmt: skip


def _arrays() -> Iterator[Case]:
    for shape in SHAPES:
        lie = as_bytes({"images.npy": _npy(shape)})
        yield _one("shapes that lie", shape, lie, "x.npz", "data", "check", "FILE", fits=None)
        lie = as_bytes({"mu.npy": _npy(shape, "'<f8'"), "sigma.npy": _npy("(1, 1)")})
        yield _one("shapes that lie", f"reference, {shape}", lie, "x.npz", "reference", "FILE")
    for descr in DESCRS:
        lie = as_bytes({"images.npy": _npy("(4, 5, 5)", descr)})
        yield _one("types that lie", descr[:20], lie, "x.npz", "data", "check", "FILE")
        lie = as_bytes({"mu.npy": _npy("(4,)", descr), "sigma.npy": array(np.ones((3, 3)))})
        yield _one("types that lie", f"reference, {descr[:20]}", lie, "x.npz", "reference", "FILE")
    deep = as_bytes({"images.npy": _npy("(" * 5_000 + ")" * 5_000)})
    yield _one("shapes that lie", "nested", deep, "x.npz", "data", "check", "FILE")
    x = array(X)
    for labels in ([0, 1, 2**31 - 1], [0, 1, 2**62], [-1, 0, 1], [0, 1, 1_000_000], [0.5, 1, 2]):
        content = as_bytes({"images.npy": x, "labels.npy": array(np.array(labels))})
        yield _one("labels", f"array {labels}", content, "x.npz", "data", "check", "FILE")
    content = as_bytes({"images.npy": x, "labels.npy": array(np.array([0, 1, 999_999]))})
    yield _one(
        "labels", "the largest that is one", content, "x.npz", "data", "check", "FILE", fits=True
    )


# safetensors


def _tensors_file(
    header: bytes | Mapping[str, Any], body: bytes = b"", size: int | None = None
) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


HEADERS = (2**63, 2**64 - 1, 2**40, 10**8, 17 << 20, 0, 5)


def _safetensors() -> Iterator[Case]:
    def part(
        dtype: Any = "F32", shape: Any = (1,), start: Any = 0, end: Any = 4
    ) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    one = {"a": part()}
    named = b'{"a":%s,"a":%s}' % ((json.dumps(part()).encode(),) * 2)
    cases: dict[str, bytes] = {
        **{f"header of {size}": _tensors_file(one, bytes(4), size) for size in HEADERS},
        "overlap": _tensors_file({"a": part(), "b": part()}, bytes(4)),
        "gap": _tensors_file({"a": part(), "b": part(start=8, end=12)}, bytes(12)),
        "beyond": _tensors_file({"a": part(end=4_000)}, bytes(4)),
        "backwards": _tensors_file({"a": part(start=4, end=0)}, bytes(4)),
        "huge shape": _tensors_file({"a": part(shape=(1 << 40, 1 << 40))}, bytes(4)),
        "largest shape": _tensors_file({"a": part(shape=(2**63, 2))}, bytes(4)),
        "negative": _tensors_file({"a": part(shape=(-1,))}, bytes(4)),
        "floats": _tensors_file({"a": part(shape=(1.0,))}, bytes(4)),
        "type": _tensors_file({"a": part("F99")}, bytes(4)),
        "type of numbers": _tensors_file({"a": part(3)}, bytes(4)),
        "twice": _tensors_file(named, bytes(4)),
        "deep": _tensors_file(b'{"a":' + b"[" * 100_000),
        "text": _tensors_file(b"hello, this is no JSON"),
        "list": _tensors_file(b"[]"),
        "not UTF-8": _tensors_file(b'{"\xff":1}'),
        "more after": _tensors_file(one, bytes(400)),
        "metadata": _tensors_file({"__metadata__": {"a": 1}}),
        "cut": _tensors_file(one, bytes(2)),
        "empty": b"",
    }  # fmt: skip
    for name, content in cases.items():
        yield _one("safetensors", name, content, "x.safetensors", "inspect", "FILE")
    many = {f"{i}": part(shape=(0,), end=0) for i in range(200_000)}
    yield _one(
        "safetensors",
        "200,000 tensors",
        partial(_tensors_file, many),
        "x.safetensors",
        "inspect",
        "FILE",
        fits=None,
    )
    told = {"__metadata__": {str(i): "x" * 1_000 for i in range(10_000)}}
    yield _one(
        "safetensors",
        "metadata of 10 MB",
        _tensors_file(told),
        "x.safetensors",
        "inspect",
        "FILE",
        fits=None,
    )
    yield _one(
        "controls",
        "safetensors",
        _tensors_file(one, bytes(4)),
        "x.safetensors",
        "inspect",
        "FILE",
        fits=True,
    )


# JSON, labels, captions and prompts

JSONS: dict[str, bytes] = {
    "lists": b'{"labels": [' + b"[]," * 1_000_000 + b"[]]}",
    "objects": b'{"labels": [' + b"{}," * 1_000_000 + b"{}]}",
    "numbers": b'{"labels": [' + b"1e9," * 1_000_000 + b"1]}",
    "texts": b'{"classes": [' + b'"ab",' * 1_000_000 + b'"c"]}',
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "key twice": b'{"labels": null, "labels": []}',
    "digits": b'{"labels": [["a.png", ' + b"9" * 100_000 + b"]]}",
    "exponent": b'{"labels": [["a.png", 1e400]]}',
    "infinite": b'{"labels": [["a.png", Infinity]]}',
    "NaN": b'{"labels": [["a.png", NaN]]}',
    "2^31 - 1": b'{"labels": [["a.png", 2147483647]]}',
    "million": b'{"labels": [["a.png", 1000000]]}',
    "negative": b'{"labels": [["a.png", -1]]}',
    "wrong types": b'{"labels": {"a.png": 1}}',
    "long text": b'{"labels": [["' + b"a" * 20_000_000 + b'", 1]]}',
    "wide text": b'{"labels": [["' + "\U0001f600".encode() + b"a" * 20_000_000 + b'", 1]]}',
    "space": b" " * 20_000_000,
    "cut": b'{"labels": [["a.png", 1',
    "empty": b"",
    "UTF-16": '{"labels": null}'.encode("utf-16"),
    "Latin-1": b'{"labels": [["\xe4.png", 1]]}',
    "null byte": b'{"labels": null}\0',
    "lone surrogate": b'{"labels": [["\\ud800.png", 1]]}',
}
TEXTS: dict[str, bytes] = {
    "UTF-16": "ein Würfel\n".encode("utf-16"),
    "UTF-16 without mark": "ein 方\n".encode("utf-16-le"),
    "UTF-32": "a\n".encode("utf-32"),
    "Latin-1": b"W\xfcrfel\n",
    "overlong": b"\xc0\xaf\n",
    "surrogate": b"\xed\xa0\x80\n",
    "one line": b"a" * 40_000_000,
    "one line of CR": b"a\r" * 10_000,
    "CR": b"\r" * 3_000_000,
    "CR and LF": b"\n\r" * 1_000_000,
    "nulls": b"\0" * 3_000_000,
    "empty": b"",
    "mark alone": b"\xef\xbb\xbf",
    "spaces": b" \n" * 1_000_000,
    "long": b"a" * 10_001,
}
MAY_FIT = {"one line of CR", "nulls"}


def _texts() -> Iterator[Case]:
    for name, content in JSONS.items():
        yield _set("labels in JSON", name, {"a.png": PNG, "dataset.json": content})
        zipped = as_bytes({"top/a.png": PNG, "top/dataset.json": content})
        yield _zip("labels in JSON", f"zip, {name}", zipped)

        def pack(home: Path, content: bytes = content) -> Entry:
            path = as_folder(home / "set", {"a.png": PNG, "b.json": content})
            return "data", "pack", str(path), str(home / "x.zip"), "--labels", str(path / "b.json")

        yield Case("labels in JSON", f"file, {name}", pack)
        yield _one("prompts", f"lines of JSON, {name}", content, "x.jsonl", "prompts", "FILE")

        def captions(home: Path, content: bytes = content) -> Entry:
            path = as_folder(home / "set", {"a.png": PNG, "metadata.jsonl": content})
            return "captions", str(path)

        yield Case("captions", name, captions)
    for name, content in TEXTS.items():
        for suffix in ("txt", "csv", "jsonl"):
            may = None if name in MAY_FIT else False
            yield _one(
                "prompts", f"{suffix}, {name}", content, f"x.{suffix}", "prompts", "FILE", fits=may
            )
    for name, content in {
        "quote": b'prompt\n"' + b"a" * 3_000_000,
        "fields": b"prompt\n" + b"," * 3_000_000,
        "columns": b",".join(b"c%d" % i for i in range(300_000)) + b"\na",
        "columns twice": b"prompt,prompt\na,b",
        "long field": b"prompt\n" + b"a" * 200_000,
    }.items():
        yield _one("prompts", f"csv, {name}", content, "x.csv", "prompts", "FILE")
    yield _one("controls", "prompts", b"a\r\nb", "x.txt", "prompts", "FILE", fits=True)
    rows = b'{"file_name": "a.png", "text": "a"}'

    def told(home: Path) -> Entry:
        return "captions", _folder(home, {"a.png": PNG, "metadata.jsonl": rows})

    yield Case("controls", "captions", told, True)


# what is no file


def _place(path: Path, what: str) -> None:
    """Something else than a regular file."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling link": "nowhere", "circular link": path.name}.get(what, what))


THINGS = (
    *("pipe", "socket", "folder", "dangling link", "circular link"),
    *("/dev/zero", "/dev/full", "/dev/random", "/proc/self/mem"),
)
PLACES: dict[str, tuple[str, ...]] = {
    "x.pkl": ("inspect", "FILE"),
    "x.safetensors": ("inspect", "FILE"),
    "y.pkl": ("convert", "FILE", "HOME/out"),
    "x.zip": ("data", "check", "FILE"),
    "x.npz": ("data", "check", "FILE"),
    "set/dataset.json": ("data", "check", "HOME/set"),
    "l.json": ("data", "pack", "HOME/set", "HOME/x.zip", "--labels", "FILE"),
    "set/metadata.jsonl": ("captions", "HOME/set"),
    "x.txt": ("prompts", "FILE"),
    "r.npz": ("reference", "FILE"),
    "x.pth": ("state", "FILE"),
    "model/manifest.json": ("inspect", "HOME/model"),
    "run/run.json": ("inspect", "HOME/run"),
}


def _no_files() -> Iterator[Case]:
    for what, (place, words) in itertools.product(THINGS, PLACES.items()):

        def make(home: Path, what: str = what, place: str = place, words: Entry = words) -> Entry:
            as_folder(home / "set", {"a.png": PNG})
            (home / place).parent.mkdir(exist_ok=True)
            _place(home / place, what)
            file = str(home / place)
            return tuple(w.replace("HOME", str(home)) if w != "FILE" else file for w in words)

        yield Case("what is no file", f"{what} as {place}", make)
    for what in THINGS:

        def beside(home: Path, what: str = what) -> Entry:
            as_folder(home / "set", {"a.png": PNG})
            _place(home / "set" / "b.png", what)
            return "data", "check", str(home / "set"), "--sheet", "sheet.png"

        # /proc says that memory is a regular file
        yield Case("no pictures among pictures", what, beside, not what.startswith("/proc"))


def _networks() -> Iterator[Case]:
    """Arguments of networks that would be larger than any machine."""
    small = {"img_resolution": 8, "img_channels": 3, "model_channels": 8}
    for name, more in {
        "channels": {"model_channels": 16_384, "channel_mult": [256] * 4},
        "blocks": {"num_blocks": 32, "channel_mult": [1] * 4},
        "10^9 blocks": {"num_blocks": 10**9},
        "classes": {"label_dim": 1_000_000},
        "10^12 classes": {"label_dim": 10**12},
        "resolution": {"img_resolution": 16_384},
        "attention": {"attn_resolutions": list(range(9_000))},
        "levels": {"channel_mult": [1] * 5_000},
        "infinite": {"dropout": float("inf")},
        "NaN": {"sigma_data": float("nan")},
        "mults": {"channel_mult": [10**30]},
    }.items():
        for class_name in ("EDMPrecond", "iDDPMPrecond", "Precond"):
            found = network({"w": tensor()}, _init_kwargs=small | more)
            meta = Raw(found.code.replace(value("EDMPrecond"), value(class_name)))
            content = pickled({"ema": meta})
            yield _inspect("arguments of networks", f"{class_name}, {name}", content, None)
            words = ("x.pkl", "convert", "FILE", "out")
            yield _one("arguments of networks", f"convert, {class_name}, {name}", content, *words)


def cases() -> Iterator[Case]:
    """All of them, one at a time: together they take hundreds of megabytes."""
    parts = (
        _pickles,
        _tensors,
        _archives,
        _pictures,
        _arrays,
        _safetensors,
        _texts,
        _no_files,
        _networks,
    )
    for part in parts:
        yield from part()
