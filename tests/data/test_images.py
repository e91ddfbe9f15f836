"""Pictures stand upright as their EXIF orientation says, and numbers of folders are numbers."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from fewstep.data.captions import open_captions
from fewstep.data.images import fit
from fewstep.data.picture_set import first_shape, load_pictures, spread_labels
from fewstep.data.readers import reader_of
from tests.command import fewstep
from tests.picture_files import as_folder, as_zip, encoded, noise

X = noise(1, 12, 3)[0, :8]
"""(8, 12, 3): no turn leaves it as it is."""
FORMS = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}


def turned(orientation: int, form: str = "png") -> bytes:
    """A file that a viewer shows turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(X, form.upper(), exif=exif, **FORMS[form])


def late(data: bytes) -> bytes:
    """A PNG whose EXIF data come after its pixels, as the format allows."""
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    return data[:start] + data[end:last] + data[start:end] + data[last:]


def shown(data: bytes) -> np.ndarray:
    """What a viewer shows: Pillow's own function is the reference."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image is not None
    return np.asarray(image)


@pytest.mark.parametrize("form", [*FORMS, "late"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(form: str, orientation: int, tmp_path: Path) -> None:
    """Decoded, by their header, and cut to a square; from folders and zips, and it is told."""
    data = late(turned(orientation)) if form == "late" else turned(orientation, form)
    wanted = shown(data)
    assert np.array_equal(wanted, np.asarray(Image.open(io.BytesIO(data)))) == (orientation == 1)
    name = f"a.{'png' if form == 'late' else form}"
    for path in (
        as_folder(tmp_path / "set", {name: data}),
        as_zip(tmp_path / "set.zip", {name: data}),
    ):
        reader = reader_of(path)
        assert first_shape(reader) == (3, *wanted.shape[:2])
        assert np.array_equal(np.asarray(reader.image(0)), wanted)
        cut = (
            load_pictures(reader, spread_labels(0, 1), (3, 6, 6), 6)
            .take(spread_labels(0, 1))[0]
            .permute(1, 2, 0)
        )
        assert np.array_equal(cut.numpy(), np.asarray(fit(Image.fromarray(wanted), 6)))
        told = f"1 turned upright as their EXIF orientation says: {name}"
        assert reader.notes.lines() == ([told] if orientation > 1 else [])


def test_packing_turns_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_folder(Path("set"), {"a.jpg": turned(6, "jpeg"), "b.png": turned(1), "c.png": turned(3)})
    done = fewstep("data", "pack", "set", "set.zip", "--resolution", "8")
    words = "2 turned upright as their EXIF orientation says: a.jpg, c.png\n"
    assert (done.code, done.err[-len(words) :]) == (0, words)
    reader = reader_of("set.zip")
    for row, data in enumerate((turned(6, "jpeg"), turned(1), turned(3))):
        wanted = np.asarray(fit(Image.fromarray(shown(data)), 8))
        assert np.array_equal(np.asarray(reader.image(row)), wanted)
    assert reader.notes.lines() == []  # they are upright now


def test_captioned_pictures_are_upright(tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": "a.jpg", "text": "a house"})]
    content = {"a.jpg": turned(8, "jpeg"), "metadata.jsonl": "\n".join(rows).encode()}
    folder = open_captions(as_folder(tmp_path / "set", content))
    assert np.array_equal(np.asarray(folder.reader.image(0)), shown(content["a.jpg"]))
    told = "1 turned upright as their EXIF orientation says: a.jpg"
    assert folder.reader.notes.lines() == [told]


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"junk" * 9])
def test_exif_that_cannot_be_read_turns_nothing(exif: bytes, tmp_path: Path) -> None:
    as_folder(tmp_path, {"a.png": encoded(X, exif=exif)})
    assert np.array_equal(np.asarray(reader_of(tmp_path).image(0)), X)


ORDERS = {
    "numbers": (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
    "zeros": (["007", "10", "08"], ["007", "08", "10"]),
    "mixed": (["b", "10", "9", "A"], ["9", "10", "A", "b"]),
    "words": (["class10", "class2"], ["class10", "class2"]),
    "large": (["9" * 200, "1" + "0" * 200], ["9" * 200, "1" + "0" * 200]),
    "others": (["٣", "-1", "2"], ["2", "-1", "٣"]),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("top", ["", "set/", "a/b/"])
def test_folders_of_numbers_are_in_the_order_of_numbers(
    kind: str, top: str, tmp_path: Path
) -> None:
    """Whichever folder they all lie in; the same in a folder and in a zip."""
    names, wanted = ORDERS[kind]
    content = {f"{top}{name}/x.png": encoded(X) for name in names}
    for path in (as_folder(tmp_path / "set", content), as_zip(tmp_path / "s.zip", content)):
        reader = reader_of(path)
        assert reader.classes == wanted
        assert reader.labels is not None
        by_name = {
            name.removeprefix(top).partition("/")[0]: label
            for name, label in zip(reader.names, reader.labels.tolist(), strict=True)
        }
        assert by_name == {name: label for label, name in enumerate(wanted)}
        told = wanted != sorted(wanted)
        assert [line[:26] for line in reader.notes.lines()] == [
            "labels by folder, numbers "
        ] * told


def test_the_order_of_numbers_is_told_and_is_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun with other labels is not continued with these."""
    monkeypatch.chdir(tmp_path)
    as_folder(Path("set"), {f"{i}/x.png": encoded(X) for i in (0, 2, 10)})
    done = fewstep("data", "pack", "set", "set.zip", "--resolution", "8")
    words = "numbers in their order and before words: 0 is '0', 1 is '2', 2 is '10'\n"
    assert done.err.endswith(words)
    assert words in fewstep("data", "check", "set").out
    reader = reader_of("set")
    by_words = reader_of("set").fingerprint()
    reader.notes.sentences.clear()
    assert reader.fingerprint() != by_words


def test_sets_in_the_order_of_words_keep_their_fingerprint(tmp_path: Path) -> None:
    """Runs of earlier versions go on: names and sizes, as they were digested."""
    content = {f"{i}/x.png": encoded(X) for i in range(10)}
    reader = reader_of(as_folder(tmp_path / "set", content))
    plain = "".join(f"{name} {len(data)}\n" for name, data in content.items())
    assert reader.fingerprint() == hashlib.sha256(plain.encode()).hexdigest()
    assert reader.notes.lines() == []
