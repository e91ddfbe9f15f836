"""Hundreds of strangers' files: taken, or refused in a sentence, in little memory and time."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import pytest

import fewstep.diffusion.model
from fewstep.data.errors import Unfit
from fewstep.data.images import decode, peek
from fewstep.data.readers import reader_of
from fewstep.data.zip_archive import ZipArchive
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.runs.inspection import inspect_model
from fewstep.safe_pickle import UnsafeSnapshotError, parse_snapshot
from fewstep.storage import bounded_reading
from fewstep.storage.bounded_reading import content, json_value, overlapping, tensors_header
from fewstep.storage.files import Damaged, unpack
from tests.pickle_assembler import Raw, network, pickled, tensor, value
from tests.picture_files import as_bytes as zipped, as_folder, as_npz, as_zip, encoded
from tests.strangers_files import GOOD, X, cases, png

ROOT = Path(__file__).parents[2]
SECONDS = 10
MEMORY, SPARE = 4, 200 << 20
"""Bytes of memory for each byte of a file, and beyond."""


def judged(most: int) -> list[dict[str, Any]]:
    """What the first `most` files of each kind cost, measured in a process of their own."""
    command = [sys.executable, "-m", "tests.measure_hostile_files", str(most)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    report: list[dict[str, Any]] = json.loads(done.stdout)
    for file in report:
        where = f"{file['kind']}, {file['name']}: {file['said']}"
        assert file["outcome"] in ("taken", "refused"), where
        assert file["fits"] in (None, file["outcome"] == "taken"), where
        assert file["seconds"] < SECONDS, where
        assert file["grown"] < MEMORY * file["bytes"] + SPARE, where
        assert file["outcome"] == "taken" or len(file["said"]) > 20, where
    return report


def test_one_file_of_each_kind() -> None:
    report = judged(1)
    assert len({file["kind"] for file in report}) >= 40
    assert sum(file["outcome"] == "taken" for file in report) >= 9  # the controls


@pytest.mark.slow
def test_a_dozen_files_of_each_kind() -> None:
    """python -m tests.measure_hostile_files takes all."""
    report = judged(12)
    counts = Counter(file["outcome"] for file in report)
    kinds = Counter(case.kind for case in cases())
    assert sum(kinds.values()) >= 700
    assert len(report) >= sum(min(count, 12) for count in kinds.values()) >= 350
    assert counts["refused"] >= 250
    assert counts["taken"] >= 40


# the bounds, one by one


def test_one_text_cannot_be_told_over_and_over() -> None:
    """However often it is referred to: in arguments, keys, names and sources."""
    text, again = Raw(value("a" * 400) + b"q\1"), Raw(b"h\1")
    few = {f"k{i}": again if i else text for i in range(100)}
    many = {f"k{i}": again if i else text for i in range(9_000)}
    found = parse_snapshot(pickled({"ema": network({"w": tensor()}, _init_kwargs=few)})).objects[
        "ema"
    ]
    assert found.init_kwargs == {f"k{i}": "a" * 400 for i in range(100)}
    with pytest.raises(UnsafeSnapshotError, match="characters of plain text"):
        parse_snapshot(pickled({"ema": network({"w": tensor()}, _init_kwargs=many)}))
    assert parse_snapshot(pickled({"x": many, "y": 1})).left == ("x",)
    shared = Raw(value(network({"n" * 400: tensor()})) + b"q\1")
    kids = {f"{i:04}": again if i else shared for i in range(9_000)}
    with pytest.raises(UnsafeSnapshotError, match="characters of names"):
        parse_snapshot(pickled({"ema": network({}, kids)}))


@pytest.mark.parametrize("distance", [0, 1, 30, 66])
def test_no_byte_belongs_to_two_members(distance: int, tmp_path: Path) -> None:
    """Wherever a second header lies within a member; side by side is the control."""
    inner = zipped({"b.png": GOOD["00000/img00000000.png"]})
    place = inner.index(b"PK\1\2")
    outer = zipped({"a.png": bytes(distance) + inner[:place]})
    start, end = outer.index(b"PK\1\2"), outer.index(b"PK\5\6")
    entry = bytearray(inner[place : inner.index(b"PK\5\6")])
    entry[42:46] = struct.pack("<L", 35 + distance)
    index = outer[start:end] + bytes(entry)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(index), start, 0)
    path = tmp_path / "x.zip"
    path.write_bytes(outer[:start] + index + last)
    assert zipfile.ZipFile(path).namelist() == ["a.png", "b.png"]
    with pytest.raises(ValueError, match=r"1 over bytes of another: b\.png"):
        ZipArchive(path)
    assert list(ZipArchive(as_zip(tmp_path / "y.zip", GOOD)).members) == list(GOOD)


def test_overlapping_spans() -> None:
    assert overlapping([(0, 4), (4, 4), (9, 1)], 10) is None
    assert overlapping([(4, 4), (0, 5)], 10) == 0
    assert overlapping([(0, 4), (0, 4)], 10) == 1
    assert overlapping([(0, 4), (8, 3)], 10) == 1
    assert overlapping([(0, 0), (0, 0)], 0) is None


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, bounded_reading.HEADER + 1, 1_000])
def test_headers_of_safetensors_are_bounded(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}" + bytes(500))
    for read in (unpack, inspect_model):
        with pytest.raises(Damaged, match=f"its header would be of {size:,} bytes; at most 502"):
            read(path)
    one = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    for names, words in ((b'{"a":%s,"a":%s}' % (one, one), "'a' is there twice"), (b"", None)):
        header = names or b'{"a":%s}' % one
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        if words is None:
            assert unpack(path)["a"].tolist() == [0]
            tensors_header(path)
            continue
        for read in (unpack, inspect_model):
            with pytest.raises(Damaged, match=words):
                read(path)


def test_json_is_bounded() -> None:
    assert json_value(b'\xef\xbb\xbf{"a": [1, 2]}', 3) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="it holds more than 2 values"):
        json_value(b'{"a": [1, 2]}', 2)
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        json_value("[" * 100_000, 10**6)
    with pytest.raises(ValueError, match="the key 'a' is there twice; keep one"):
        json_value('[{"b": {"a": 1, "c": 2, "a": 1}}]', 100)
    with pytest.raises(ValueError, match="it holds more than 4,000,000 values"):
        json_value("[" + "[]," * 2_000_000 + "0]")
    assert json_value("[NaN, 1e999, -Infinity, " + "7" * 65 + "]")[1:] == [inf, -inf, inf]
    for refused in ("NaN", "1e999", "-Infinity", "7" * 65, "0." + "7" * 63):
        with pytest.raises(ValueError, match="is not finite, or too long"):
            json_value(refused, finite=True)
    assert json_value("7" * 64, finite=True) == int("7" * 64)


def test_labels_of_few_pictures_are_not_many(tmp_path: Path) -> None:
    """A table that is too large for its pictures is neither parsed nor unpacked."""
    long, lists = b" " * (2 << 20), b'{"labels": [' + b"[]," * 300_000 + b"[]]}"
    for number, (text, words) in enumerate(
        ((long, "too large for the labels of 3 pictures"), (lists, "more than 200,024 values"))
    ):
        content = {**GOOD, "dataset.json": text}
        for path in (
            as_folder(tmp_path / f"{number}", content),
            as_zip(tmp_path / f"{number}.zip", content),
        ):
            with pytest.raises(ValueError, match=words):
                reader_of(path)


@pytest.mark.parametrize("label", [1_000_000, 2**31 - 1, 2**31, 2**62])
def test_labels_are_class_numbers(label: int, tmp_path: Path) -> None:
    """Counting them needs memory for the largest; the largest that is one is the control."""
    table = {"labels": [[name, label] for name in GOOD]}
    path = as_folder(tmp_path / "set", {**GOOD, "dataset.json": json.dumps(table).encode()})
    arrays = as_npz(tmp_path / "x.npz", images=X, labels=[0, 1, label])
    for which in (path, arrays):
        with pytest.raises(ValueError, match="with a label that is no class number"):
            reader_of(which)
    found = reader_of(as_npz(tmp_path / "y.npz", images=X, labels=[0, 1, 999_999])).labels
    assert found is not None
    assert found.tolist() == [0, 1, 999_999]


def test_a_thin_picture_is_bounded_by_its_bytes() -> None:
    """A large picture of few bytes is refused by its header; one with as many bytes is not."""
    few, many = png(4_000, 4_000, bytes(100)), png(4_000, 4_000, bytes(1 << 20))
    with pytest.raises(Unfit, match="larger than 9 megapixels in so few bytes"):
        peek(few)
    assert peek(many).size == (4_000, 4_000)
    assert peek(png(3_000, 3_000, bytes(100))).size == (3_000, 3_000)
    flat = encoded(X[0], "JPEG", progressive=True)
    scan = flat[flat.rindex(b"\xff\xda") : -2]
    assert decode(flat[:-2] + scan * 100 + flat[-2:]).size == (8, 8)
    with pytest.raises(Unfit, match="of more than 200 scans"):
        decode(flat[:-2] + scan * 200 + flat[-2:])


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    """They end at once; links to files are files."""
    (tmp_path / "a").write_text("abc")
    (tmp_path / "b").symlink_to("a")
    assert content(tmp_path / "b", 3) == b"abc"
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        content(tmp_path / "b", 2)
    for device in ("zero", "full", "random"):
        with pytest.raises(ValueError, match="is a device, not a regular file"):
            content(Path("/dev") / device, 10)


NETWORKS = {
    "width": Model(MLP(10**9), (2,)),
    "widest": Model(MLP(2**62), (2,)),
    "channels": Model(PatchUNet(10**9), (3, 8, 8)),
    "mults": Model(PatchUNet(16, (1, 10**9)), (3, 8, 8)),
    "shape": Model(MLP(16), (3, 10**9, 10**9)),
    "classes": Model(MLP(16), (2,), 10**12),
    "blocks": Model(MLP(16, 10**9), (2,)),
    "levels": Model(PatchUNet(16, (1, 1), 10**9), (3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_bounded_before_they_are_built(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewstep.diffusion.model, "TENSORS", 1_000)
    with pytest.raises(ValueError, match=r"the network has more than|no tensor has as many"):
        NETWORKS[name].build()


def test_the_machine_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network is built where its parameters and buffers fit, to the byte."""
    model = Model(MLP(16, 1), (2,), 3)
    net = model.build()
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
    monkeypatch.setattr(fewstep.diffusion.model, "memory", lambda: size)
    model.build()
    monkeypatch.setattr(fewstep.diffusion.model, "memory", lambda: size - 1)
    with pytest.raises(ValueError, match="the network has more than 0 GiB"):
        model.build()


def test_paths_have_a_bounded_table() -> None:
    with pytest.raises(ValueError, match="at most 100,000 timesteps"):
        VP(steps=10**12)
    assert VP(steps=100_000).t_max == 99_999
