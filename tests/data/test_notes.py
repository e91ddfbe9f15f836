"""Nothing of a person's data is lost without a word: it is used, refused, or counted and told."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.data import prompts
from fewstep.data.captions import open_captions
from fewstep.data.prompts import read_prompts
from fewstep.data.readers import reader_of
from fewstep.diffusion.model import Model
from fewstep.domains.pictures import Pictures
from fewstep.nets.mlp import MLP
from fewstep.training.progress import heard as hearing
from tests.command import fewstep
from tests.picture_files import as_folder, as_zip, encoded, files, labelled, noise

X = noise(4, 8, 3)
GOOD = files(X)
FIRST = next(iter(GOOD))
OTHERS = ("bmp", "gif", "tif", "tiff", "jp2", "avif", "heic", "ppm", "npy", "txt", "PSD", "")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("suffix", OTHERS)
def test_files_of_other_kinds_are_counted(suffix: str, kind: str, tmp_path: Path) -> None:
    names = [f"00000/b{i}.{suffix}".rstrip(".") for i in range(5)]
    content = GOOD | dict.fromkeys(names, b"x") | {".hidden/a.png": b"", "__MACOSX/b.png": b""}
    make = as_folder if kind == "folder" else as_zip
    reader = reader_of(make(tmp_path / f"set.{kind}", content))
    assert len(reader) == 4
    what = f".{suffix.lower()}" if suffix else "files without a suffix"
    assert sorted(reader.notes.lines()) == [
        "2 passed over, hidden: .hidden/a.png, __MACOSX/b.png",
        f"5 passed over, {what}: {', '.join(names[:3])} and 2 more",
    ]


def test_a_set_of_other_kinds_alone_says_which(tmp_path: Path) -> None:
    path = as_folder(tmp_path / "set", {"a.bmp": b"", "b.bmp": b""})
    words = r"holds no picture \(.jpeg, .jpg, .png, .webp\); 2 passed over, .bmp: a.bmp, b.bmp"
    with pytest.raises(ValueError, match=words):
        reader_of(path)


def test_what_is_no_file_is_counted_and_labels_are_not_passed_over(tmp_path: Path) -> None:
    path = as_folder(tmp_path / "set", GOOD)
    os.mkfifo(path / "pipe.png")
    (path / "gone.png").symlink_to("nowhere")
    (path / "around.png").symlink_to("around.png")
    (path / "elsewhere").symlink_to(tmp_path)
    told = "4 passed over, no regular files: around.png, elsewhere, gone.png and 1 more"
    assert reader_of(path).notes.lines() == [told]
    os.mkfifo(path / "dataset.json")
    with pytest.raises(ValueError, match=r"dataset\.json is a pipe, not a regular file"):
        reader_of(path)


def test_it_is_told_once_where_a_run_begins(tmp_path: Path) -> None:
    """By `heard` to a command line; as a warning where nobody listens."""
    path = as_folder(tmp_path / "set", GOOD | {"a.gif": b"", "b.gif": b""})
    domain, model, heard = Pictures(str(path)), Model(MLP(), (3, 8, 8)), list[str]()
    with hearing(heard.append):
        for _ in range(3):
            domain.source(model, data_free=False)
    assert heard == [f"{path}: 2 passed over, .gif: a.gif, b.gif"]
    with pytest.warns(UserWarning, match=r"set: 2 passed over, \.gif"):
        domain.source(model, data_free=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the control: a plain set says nothing
        Pictures(str(as_folder(tmp_path / "plain", GOOD))).source(model, data_free=False)


@pytest.mark.parametrize("top", ["", "set/", "a b/c/"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("rooted", [False, True])
def test_labels_in_the_folder_of_the_pictures_are_used(
    kind: str, top: str, rooted: bool, tmp_path: Path
) -> None:
    """As where a folder was zipped with its name; names are relative to the file's own place."""
    content = {f"{top}{name}": data for name, data in labelled(GOOD, [3, 1, 0, 1]).items()}
    if rooted:
        pairs = [[f"{top}{name}", label] for name, label in zip(GOOD, [2, 2, 0, 5], strict=True)]
        content["dataset.json"] = json.dumps({"labels": pairs}).encode()
    make = as_folder if kind == "folder" else as_zip
    reader = reader_of(make(tmp_path / f"x.{kind}", content))
    assert reader.labels is not None
    assert reader.labels.tolist() == ([2, 2, 0, 5] if rooted else [3, 1, 0, 1])
    second = rooted and top != ""
    assert len(reader.notes.lines()) == second
    if second:
        assert reader.notes.lines()[0].startswith("1 passed over, dataset.json beside no or")


def test_a_folder_that_holds_class_folders_is_passed_over(tmp_path: Path) -> None:
    content = {"set/ant/a.png": encoded(X[0]), "set/bee/a.png": encoded(X[1])}
    reader = reader_of(as_zip(tmp_path / "x.zip", content))
    assert reader.labels is not None
    assert (reader.labels.tolist(), reader.classes) == ([0, 1], ["ant", "bee"])


FRAMES = [Image.fromarray(x) for x in X]


def animated(form: str) -> bytes:
    buffer = io.BytesIO()
    FRAMES[0].save(buffer, form, save_all=True, append_images=FRAMES[1:], lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "suffix"), [("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")])
def test_of_an_animation_the_first_frame_is_taken_and_told(
    form: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_folder(Path("set"), {f"a.{suffix}": animated(form), f"b.{suffix}": encoded(X[1])})
    reader = reader_of("set")
    got = np.asarray(reader.image(0).convert("RGB")).astype(int)
    if form != "MPO":  # which are JPEG
        assert np.array_equal(got, X[0])
    reader.image(1)
    line = f"1 with several frames, of which the first is taken: a.{suffix}"
    assert reader.notes.lines() == [line]
    assert line in fewstep("data", "check", "set").out.splitlines()
    done = fewstep("data", "check", "set", "--json")
    assert json.loads(done.out)["notes"] == [line]
    assert fewstep("data", "pack", "set", "a.zip").err.splitlines()[-1] == line


TEXTS = ["a red cube", "ein Würfel, blau", "x" * 40]
LINES = {
    "p.txt": [*TEXTS[:2], "", TEXTS[2]],
    "p.jsonl": [json.dumps(TEXTS[0]), json.dumps({"text": TEXTS[1]}), "", json.dumps(TEXTS[2])],
    "p.csv": ["id,prompt", f"1,{TEXTS[0]}", f'2,"{TEXTS[1]}"', f"3,{TEXTS[2]}"],
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", LINES)
def test_lines_end_in_three_ways(
    name: str, end: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the parts end in which a file is read, with and without an end of the last."""
    monkeypatch.setattr(prompts, "CHUNK", chunk)
    path = tmp_path / name
    for last in ("", end, end * 3):
        path.write_bytes("\ufeff".encode() + end.join(LINES[name]).encode() + last.encode())
        assert read_prompts(path) == TEXTS
    broken = "{}" if name == "p.jsonl" else "x" * 10_001
    path.write_bytes(end.join([*LINES[name], "1," * (name == "p.csv") + broken]).encode())
    with pytest.raises(ValueError, match="line 5"):
        read_prompts(path)


def test_captions_end_in_three_ways_too(tmp_path: Path) -> None:
    path = as_folder(tmp_path / "set", {"a.png": encoded(X[0]), "b.png": encoded(X[1])})
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"the {name}"}) for name in "ab"]
    for end in ("\n", "\r\n", "\r"):
        (path / "metadata.jsonl").write_bytes(end.join(rows).encode())
        assert open_captions(path).captions == ["the a", "the b"]
        assert open_captions(path).reader.notes.lines() == []


TWICE = {
    "p.jsonl": (b'"a"\n{"prompt": "a", "prompt": "b"}', r"line 2 .* key 'prompt' is there twice"),
    "in.jsonl": (b'{"prompt": "a", "b": [{"c": 1, "c": 1}]}', r"line 1 .* key 'c' is there twice"),
    "p.csv": (b"prompt,id,prompt\na,1,b", r"p.csv has 2 columns 'prompt'; keep one"),
    "more.csv": (b"prompt\na red cube, large", r"line 2 has more fields than the header; quote"),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_would_lose_a_part_of_a_prompt_is_refused(name: str, tmp_path: Path) -> None:
    data, words = TWICE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


def test_keys_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    """In the files of labels and captions, of which the last value would count alone."""
    pairs = json.dumps([[name, 0] for name in GOOD])
    twice = f'{{"labels": {pairs}, "labels": null}}'.encode()
    words = "the key 'labels' is there twice; keep one"
    for make in (as_folder, as_zip):
        with pytest.raises(ValueError, match=words):
            reader_of(make(tmp_path / f"{make.__name__}.zip", GOOD | {"dataset.json": twice}))
    table = tmp_path / "labels.json"
    table.write_bytes(twice)
    as_folder(tmp_path / "set", GOOD)
    done = fewstep(
        *("data", "pack", str(tmp_path / "set"), str(tmp_path / "x.zip"), "--labels", str(table))
    )
    assert (done.code, words in done.err) == (2, True)
    row = b'{"file_name": "a.png", "text": "a", "text": "b"}'
    path = as_folder(tmp_path / "c", {"a.png": encoded(X[0]), "metadata.jsonl": row})
    with pytest.raises(ValueError, match=r"line 1 .* key 'text' is there twice"):
        open_captions(path)
