"""Sets of pictures that are damaged, ill-made or hostile: refused by name, before training."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data import labels
from fewstep.data.images import FORMATS
from fewstep.data.picture_set import load_pictures, spread_labels
from fewstep.data.readers import reader_of
from fewstep.diffusion.model import Model
from fewstep.domains.pictures import Pictures
from fewstep.nets.mlp import MLP
from tests.command import fewstep
from tests.picture_files import as_folder, as_zip, files, labelled, noise

SIZE = 8
X = noise(12, SIZE, 3)
GOOD = files(X)
FIRST, *OTHERS = GOOD
MODEL = Model(MLP(), (3, SIZE, SIZE), 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A sound chunk of a PNG."""
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def declared(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that declares a size, whatever its data are."""
    head = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(mode: str, form: str = "PNG", size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


WHOLE = GOOD[FIRST]
FLIPPED = bytearray(WHOLE)
FLIPPED[len(WHOLE) // 2] ^= 4
PICTURES: dict[str, tuple[bytes, str]] = {
    "cut": (WHOLE[: len(WHOLE) // 2], "1 damaged: "),
    "cut at the end": (WHOLE[:-16], "1 damaged: "),
    "bit": (bytes(FLIPPED), "1 damaged: "),
    "empty": (b"", "1 damaged: "),
    "text": (b"this is no picture", "1 damaged: "),
    "short data": (declared(SIZE, SIZE, b"\0" * 30), "1 damaged: "),
    "gif": (saved("L", "GIF"), "1 damaged: "),
    "bomb": (declared(40_000, 40_000), "1 larger than 64 megapixels: "),
    "huge": (declared(2**31 - 1, 2**31 - 1), "1 larger than 64 megapixels: "),
    "wide": (declared(9000, 9000), "1 larger than 64 megapixels: "),
    "size": (saved("RGB", size=(9, SIZE)), "1 of another shape than 3x8x8: "),
    "grey": (saved("L"), "1 of another shape than 3x8x8: "),
    "alpha": (saved("RGBA"), "1 neither grey nor RGB: "),
    "palette": (saved("P"), "1 neither grey nor RGB: "),
    "16 bit": (saved("I;16"), "1 neither grey nor RGB: "),
    "cmyk": (saved("CMYK", "JPEG"), "1 neither grey nor RGB: "),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", PICTURES)
def test_one_bad_picture_is_named(kind: str, tmp_path: Path) -> None:
    """In the middle, and as the first; in a folder and in a zip."""
    data, words = PICTURES[kind]
    for place in (OTHERS[4], FIRST):
        content = {**GOOD, place: data}
        for path in (
            as_folder(tmp_path / "set", content),
            as_zip(tmp_path / "set.zip", content, zipfile.ZIP_DEFLATED),
        ):
            with pytest.raises(ValueError, match=r"\.|picture") as caught:
                Pictures(str(path)).source(MODEL, data_free=False)
            told = str(caught.value)
            if place == FIRST and kind in ("size", "grey", "alpha", "palette", "16 bit", "cmyk"):
                assert told.startswith(f"{path} holds pictures of (") or words in told
            else:
                assert told.startswith(f"{path} cannot be used; {words}{place}")


def test_all_problems_in_one_sentence(tmp_path: Path) -> None:
    content = {**GOOD, **{OTHERS[i]: b"" for i in range(5)}, OTHERS[7]: saved("L")}
    path = as_zip(tmp_path / "set.zip", content)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        Pictures(str(path)).source(MODEL, data_free=False)
    assert str(caught.value) == (
        f"{path} cannot be used; 5 damaged: {OTHERS[0]}, {OTHERS[1]}, {OTHERS[2]} and 2 more; "
        f"1 of another shape than 3x8x8: {OTHERS[7]} (1x8x8)"
    )


def test_a_picture_that_is_damaged_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets that are not held in memory: named when it is read; the check is not forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = as_folder(tmp_path / "set", GOOD)
    reader = reader_of(path)
    held = load_pictures(reader, spread_labels(0, 12), (3, SIZE, SIZE), memory=0)
    stat = (path / FIRST).stat()
    (path / FIRST).write_bytes(bytes(len(WHOLE)))
    with pytest.raises(ValueError, match=f"1 damaged: {FIRST}$"):
        held.take(spread_labels(0, 12))
    os.utime(path / FIRST, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load_pictures(
        reader, spread_labels(0, 12), (3, SIZE, SIZE), memory=0
    )  # as far as one can tell, unchanged
    for _ in range(2):  # of another time: looked at again, and never remembered as sound
        os.utime(path / FIRST, ns=(0, 1))
        with pytest.raises(ValueError, match="1 damaged"):
            load_pictures(reader, spread_labels(0, 12), (3, SIZE, SIZE), memory=0)
    (path / FIRST).unlink()
    with pytest.raises(FileNotFoundError, match="img00000000"):
        held.take(spread_labels(0, 12))


PAIRS = [[name, 0] for name in GOOD]
LABELS: dict[str, tuple[Any, str]] = {
    "missing": (PAIRS[2:], f"2 without a label in dataset.json: {FIRST}, {OTHERS[0]}"),
    "more": ([*PAIRS, ["a.png", 1]], "1 in dataset.json, but missing: a.png"),
    "twice": ([*PAIRS, [FIRST, 1]], f"1 with two labels in dataset.json: {FIRST}"),
    "minus": ([[FIRST, -1], *PAIRS[1:]], f"1 with a label that is no class number: {FIRST} (-1)"),
    "nan": ([[FIRST, float("nan")], *PAIRS[1:]], f"no class number: {FIRST} (nan)"),
    "real": ([[FIRST, 1.0], *PAIRS[1:]], f"no class number: {FIRST} (1.0)"),
    "vector": ([[n, [0, 1]] for n in GOOD], f"12 with a label that is no class number: {FIRST} ("),
    "big": ([[FIRST, 2**40], *PAIRS[1:]], f"no class number: {FIRST} (1099511627776)"),
    "true": ([[FIRST, True], *PAIRS[1:]], f"no class number: {FIRST} (True)"),
    "null": ([[FIRST, None], *PAIRS[1:]], f"no class number: {FIRST} (None)"),
    "form": ([FIRST, *PAIRS[1:]], "1 in dataset.json not of the form [name, number]: entry 0"),
    "word": ("cat", 'dataset.json is not of the form {"labels": [[name, number], ...]}'),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_do_not_match_are_named(kind: str, tmp_path: Path) -> None:
    pairs, words = LABELS[kind]
    told = json.dumps({"labels": pairs}).encode()
    for path in (
        as_folder(tmp_path / "set", {**GOOD, "dataset.json": told}),
        as_zip(tmp_path / "set.zip", {**GOOD, "dataset.json": told}),
    ):
        with pytest.raises(ValueError, match=r"dataset\.json|no class number") as caught:
            reader_of(path)
        assert words in str(caught.value)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"{", b"\xff", b"[]", b"3", b'{"labels": 3}'])
def test_dataset_json_that_is_none(text: bytes, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "set.zip", {**GOOD, "dataset.json": text})
    with pytest.raises(ValueError, match=r"dataset\.json is not (readable|of the form)"):
        reader_of(path)


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    path = str(as_zip(tmp_path / "x.zip", labelled(GOOD, range(12))))
    bare = str(as_zip(tmp_path / "y.zip", GOOD))
    ten = Model(MLP(), (3, SIZE, SIZE), 10)
    cases: list[tuple[Pictures, Model, bool, str]] = [
        (Pictures(path), ten, True, "x.zip has labels up to 11, but the model has 10 classes"),
        (Pictures(bare), ten, True, r"y.zip has no labels.*Pictures\(labels=False\) draws them"),
        (Pictures(path, labels=False), ten, False, "x.zip is used without its labels, but the"),
        (Pictures(path), Model(MLP(), (1, 8, 8)), False, r"of \(3, 8, 8\), but .* \(1, 8, 8\)"),
        (Pictures(path), Model(MLP(), (2,)), False, r"pictures are \(1 or 3, H, W\), got"),
        (Pictures(path, resolution=9), MODEL, False, r"Pictures.resolution is 9, but Model.shape"),
        (Pictures(), MODEL, False, "this method learns from data"),
        (Pictures(str(tmp_path / "z.zip")), MODEL, True, "there is no folder or file"),
    ]
    for domain, model, data_free, words in cases:
        with pytest.raises(ValueError, match=words):
            domain.source(model, data_free)
    with pytest.raises(ValueError, match="0 or more"):
        Pictures(max_items=-1)


def test_labels_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "LIMIT", 100)
    content = labelled(GOOD, range(12))
    with pytest.raises(ValueError, match=r"1 larger than 0 MiB: dataset\.json"):
        reader_of(as_zip(tmp_path / "x.zip", content))
    with pytest.raises(ValueError, match=r"dataset\.json is larger than 100 bytes"):
        reader_of(as_folder(tmp_path / "x", content))


def test_what_is_no_set_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    latents = as_zip(tmp_path / "latents.zip", {"00000/img-mean-std-00000000.npy": b"x"})
    for path, words in (
        (tmp_path / "x.txt", "is no set of pictures: a folder, a .zip or an .npz"),
        (tmp_path / "empty", "holds no picture"),
        (latents, r"holds arrays, not pictures; LatentMoments reads latents"),
        (tmp_path / "none", "there is no folder or file"),
    ):
        with pytest.raises(ValueError, match=words):
            reader_of(path)


def test_the_command_line_says_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_zip(tmp_path / "x.zip", {**files(noise(12, SIZE, 1)), OTHERS[2]: b"?"})
    train = ("train", "digits_teacher", "--steps", "1", "--model.classes", "0")
    done = fewstep(*train, "--domain", "Pictures('x.zip')", "--out", "run")
    words = f"fewstep: x.zip cannot be used; 1 damaged: {OTHERS[2]}\n"
    assert (done.code, done.out, done.err) == (2, "", words)
    assert not (tmp_path / "run").exists()
    assert set(FORMATS) == {"PNG", "JPEG", "WEBP"}
