"""Packing gives back what was packed; checking tells the truth; the page of it works."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import pack as packing
from fewstep.data.images import fit
from fewstep.data.readers import reader_of
from tests.command import TEACH, fewstep, tree
from tests.picture_files import as_folder, as_npz, as_zip, encoded, files, labelled, noise
from tests.test_docs import ROOT, follow

X = noise(30, 8, 3)
LABELS = np.random.default_rng(3).integers(0, 4, 30)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_what_is_packed_comes_back_bit_for_bit(kind: str, channels: int) -> None:
    x = X[..., :channels]
    content = labelled(files(x), LABELS)
    if kind == "folder":
        source = as_folder(Path("set"), content)
    elif kind == "zip":
        source = as_zip(Path("set.zip"), content, zipfile.ZIP_DEFLATED)
    else:
        source = as_npz(Path("set.npz"), images=x, labels=LABELS)
    for out, more in (("a.zip", ()), ("b.zip", ("--resolution", "8")), ("c.zip", ())):
        done = fewstep("data", "pack", str(source), out, *more)
        assert (done.code, done.out) == (0, f"{out}\n")
        reader = reader_of(out)
        got = np.stack([np.asarray(reader.image(i)).reshape(8, 8, -1) for i in range(30)])
        assert np.array_equal(got, x)
        assert reader.labels is not None
        assert reader.labels.tolist() == LABELS.tolist()
    assert Path("a.zip").read_bytes() == Path("b.zip").read_bytes() == Path("c.zip").read_bytes()
    with zipfile.ZipFile("a.zip") as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert file.namelist()[29:] == ["00000/img00000029.png", "dataset.json"]
    assert packing.name(1_234_567) == "01234/img01234567.png"


@pytest.mark.parametrize("crop", ["center", "dhariwal"])
def test_packing_crops_resizes_and_mixes(crop: Any) -> None:
    """Grey among colours becomes RGB; classes by folder keep their names; enlarging is told."""
    wide, tall, small = noise(1, 40, 3)[0, :24], noise(1, 20, 3)[0, :, :18], noise(1, 7, 1)[0]
    content = {"b/w.png": encoded(wide), "b/t.webp": encoded(tall, "WEBP", lossless=True)}
    source = as_folder(Path("set"), {**content, "a/s.png": encoded(small)})
    flags = ("--resolution", "9", "--crop", crop)
    done = fewstep("data", "pack", str(source), "a.zip", *flags)
    assert done.code == 0
    assert done.err.endswith("1 of 3 pictures were smaller and were enlarged\n")
    reader = reader_of("a.zip")
    assert (reader.labels.tolist(), reader.classes) == ([0, 1, 1], ["a", "b"])
    grey = Image.fromarray(small[..., 0]).convert("RGB")
    for row, image in enumerate((grey, Image.fromarray(tall), Image.fromarray(wide))):
        assert np.array_equal(np.asarray(reader.image(row)), np.asarray(fit(image, 9, crop)))
    facts = json.loads(fewstep("data", "check", "a.zip", "--json").out)
    assert facts == {
        "path": "a.zip",
        "pictures": 3,
        "shape": [3, 9, 9],
        "classes": 2,
        "names": ["a", "b"],
        "counts": [1, 2],
        "sheet": "sheet.png",
    }


def test_labels_to_pack() -> None:
    as_zip(Path("set.zip"), labelled(files(X), LABELS))
    other = [[name, 7] for name in files(X)]
    Path("other.json").write_text(json.dumps({"labels": other}))
    assert fewstep("data", "pack", "set.zip", "a.zip", "--labels", "none").code == 0
    assert fewstep("data", "pack", "set.zip", "b.zip", "--labels", "other.json").code == 0
    assert reader_of("a.zip").labels is None
    assert reader_of("b.zip").labels.tolist() == [7] * 30
    assert fewstep("data", "check", "a.zip").out == (
        "30 pictures of 8x8 pixels, RGB; all sound\nno labels\nsome of them: sheet.png\n"
    )
    told = fewstep("data", "check", "b.zip").out.splitlines()
    assert told[1:3] == ["labels 0 to 7, 0 to 30 pictures each", "     0          0"]
    assert told[9] == "     7         30"


def test_the_sheet_shows_the_pictures() -> None:
    """Evenly spread, ten in a row, each six times as large."""
    x = noise(250, 8, 1)
    as_npz(Path("x.npz"), images=x)
    assert fewstep("data", "check", "x.npz", "--sheet", "s.png").code == 0
    sheet = np.asarray(Image.open("s.png"))
    assert sheet.shape == (10 * 52 + 4, 10 * 52 + 4)
    for place in (0, 7, 42, 99):
        top, left = 4 + place // 10 * 52, 4 + place % 10 * 52
        cell = sheet[top : top + 48 : 6, left : left + 48 : 6]
        assert np.array_equal(cell, x[place * 250 // 100, ..., 0])


def test_wrong_input_is_one_sentence_and_nothing_is_written() -> None:
    as_zip(Path("bad.zip"), {**files(X), "00000/img00000004.png": b"?"})
    as_zip(Path("cut.zip"), {**files(X), "00000/img00000004.png": files(X).popitem()[1][:-20]})
    as_folder(Path("mixed"), {"a.png": encoded(X[0]), "b.png": encoded(noise(1, 9, 3)[0])})
    as_folder(Path("wide"), {"a.png": encoded(X[0]), "b.png": encoded(X[0][:5])})
    as_zip(Path("set.zip"), files(X))
    before = sorted(Path().rglob("*"))
    first = "1 damaged: 00000/img00000004.png"
    for args, words in {
        ("pack", "bad.zip", "a.zip"): f"bad.zip cannot be used; {first}",
        ("pack", "cut.zip", "a.zip"): f"cut.zip cannot be used; {first}",
        ("pack", "mixed", "a.zip"): "mixed has pictures of 8 to 9 pixels; --resolution brings "
        "them to one size",
        ("pack", "wide", "a.zip"): "wide cannot be used; 1 not square; --resolution cuts them: "
        "b.png (8x5)",
        ("pack", "none", "a.zip"): "there is no file or folder none",
        ("pack", "set.zip", "bad.zip"): "bad.zip exists already; choose another name",
        ("pack", "set.zip", "a.npz"): "a.npz is no .zip in a folder that exists; choose another "
        "name",
        ("pack", "set.zip", "a.zip", "--resolution", "-3"): "the resolution is a number of "
        "pixels, got -3",
        ("pack", "set.zip", "a.zip", "--labels", "x.json"): "x.json: No such file or directory",
        ("pack", "set.zip", "a.zip", "--labels", "wide/a.png"): "wide/a.png: dataset.json is not "
        "readable JSON ('utf-8' codec can't decode byte 0x89 in position 0: invalid start byte)",
        ("pack", "set.zip"): "fewstep data pack needs: out; fewstep data pack --help tells more",
        ("check", "cut.zip"): f"cut.zip cannot be used; {first}",
        ("check", "mixed"): "mixed cannot be used; 1 of another shape than 3x8x8: b.png (3x9x9)",
        ("chekc", "x"): "pack|check is one of pack, check; got chekc",
    }.items():
        done = fewstep("data", *args)
        sentence = done.err.splitlines()[-1].replace(
            "choose from pack, check", "choose from 'pack', 'check'"
        )
        assert (done.code, done.out, sentence) == (2, "", f"fewstep: {words}")
    assert sorted(Path().rglob("*")) == before


def test_stopping_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while pictures are written: exit code 75, and no file."""
    as_zip(Path("set.zip"), files(X))
    real, asked = packing.png, [signal.SIGTERM]

    def slow(image: Image.Image) -> bytes:
        if asked:
            signal.raise_signal(asked.pop())
        return real(image)

    monkeypatch.setattr(packing, "png", slow)
    monkeypatch.setattr("fewstep.data.picture_set.PART", 4)
    done = fewstep("data", "pack", "set.zip", "a.zip")
    assert done.code == 75
    assert "stopped at 4 of 30; nothing was written" in done.err
    assert [p.name for p in Path().iterdir()] == ["set.zip"]


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    as_zip(Path("set.zip"), files(X))
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = fewstep("data", "pack", "set.zip", "a.zip")
    assert (done.code, Path("a.zip").exists()) == (2, False)
    assert done.err.endswith("fewstep: a.zip needs 0 MiB, but 0 MiB are free\n")


def test_the_page_about_data() -> None:
    """Every command of it, with smaller runs; then what they made is there and equal."""
    follow(ROOT / "docs" / "data.md")
    with np.load("digits.npz", allow_pickle=False) as told:
        images, labels = told["images"], told["labels"]
    reader = reader_of("digits.zip")
    assert torch.equal(reader.labels, torch.from_numpy(labels))
    assert np.array_equal(np.asarray(reader.image(17)), images[17, ..., 0])
    assert fewstep("report", "runs/again").code == 0
    done = fewstep("evaluate", "runs/again")
    words = "fewstep: runs/again cannot be measured: its domain, Pictures, has no metrics"
    assert (done.code, done.err.partition(";")[0]) == (2, words)


def test_a_run_knows_its_data(home: Path) -> None:
    """Recorded in run.json; the run goes on with the same set elsewhere, not with another one."""
    x = noise(24, 8, 1)
    as_folder(home / "set", labelled(files(x), [0] * 24))
    train = (*TEACH, "--domain", "Pictures('set')", "--out", "run", "--sample-every", "100")
    done = fewstep(*train)
    assert done.code == 0, done.err
    first = json.loads((home / "run" / "run.json").read_text())["run"]["domain"]["sha256"]
    names = sorted(Path("set").rglob("*.png"))
    lines = (f"{p.relative_to('set')} {p.stat().st_size}\n" for p in names)
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest()
    shutil.copytree("set", "moved")  # other dates
    shutil.rmtree("set")
    Path("moved").rename("set")
    assert "finished already" in fewstep(*train).err
    next(Path("set").rglob("*.png")).write_bytes(b"another")
    before = tree(home / "run")
    changed = fewstep(*train)
    assert changed.code == 2
    assert f"run.domain.sha256 was {first}, now " in changed.err
    assert tree(home / "run") == before
    recorded = fewstep(*train, "--domain.sha256", first, "--out", "other", "--quiet")
    assert (recorded.code, recorded.err) == (
        2,
        "fewstep: set no longer holds what the run was started with\n",
    )
