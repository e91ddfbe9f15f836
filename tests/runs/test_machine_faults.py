"""Faults of the machine around one process: memory, clocks, paths, versions.

The table in docs/reliability.md names the test of each fault; several processes are in
tests/distributed, deaths in tools/drill.py, disks in test_disk, damaged files in test_checkpoint
and test_damage.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import measure
from fewstep.data.batches import Latents
from fewstep.runs.monitor import Monitor
from fewstep.storage import checkpoint, files
from fewstep.storage.files import pack, read_folder, unpack, write_folder
from tests.cli.test_cli import WEIGHTS, interrupt
from tests.command import DISTIL, TEACH, Result, fewstep
from tests.processes import together
from tests.storage.test_full_disk import TINY


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_broken_numbers_is_refused(
    value: float, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As teacher, and as the network to start from; its digests are right."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs" / "teacher", "bad")
    path = tmp_path / "bad" / "student"
    tensors = unpack(path / "model.safetensors")
    name = "net.blocks.0.inner.bias"
    tensors[name][3] = value
    stored = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    facts = {"kind": read_folder(path)["kind"]}
    write_folder(path, {**stored, "model.safetensors": pack(tensors)}, facts)
    teacher = str(finished / "runs" / "teacher")
    for flags in (("--teacher", "bad"), ("--teacher", teacher, "--init", "bad")):
        refused = fewstep(*DISTIL, *flags, "--out", "x")
        assert refused == (
            2,
            "",
            f"fewstep: bad holds numbers that are not finite, in {name}: its training diverged, "
            "or its file was converted wrongly; choose another model\n",
        )
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_does_not_suffice(error: Exception, tmp_path: Path, monkeypatch: Any) -> None:
    """In the third step: one sentence, and the checkpoint of the second continues."""
    monkeypatch.chdir(tmp_path)
    log = Monitor.log

    def logging(self: Monitor, record: Any) -> None:
        log(self, record)
        if record.step == 3:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", logging)
        code, _, err = fewstep(*TINY)
    assert code == 1
    assert err.splitlines()[-1] == (
        "fewstep: the memory does not suffice; compute each batch in more parts with "
        "--accumulate, or lower --batch; what was saved is kept"
    )
    assert fewstep(*TINY).err.startswith("continuing from step 2 of 6\n")


def test_an_error_of_the_program_is_not_hidden(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def wrong(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Monitor, "log", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        fewstep(*TINY)


def test_clocks_do_not_matter(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The clock goes back an hour and the older checkpoint looks newer."""
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 17, 15)
        assert fewstep(*args).code == 75
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    for age, path in enumerate(checkpoint.find_checkpoints(Path("x/checkpoints"))):
        os.utime(path, (now - age * 86400, now - age * 86400))
    assert fewstep(*args).err.startswith("continuing from step 17 of 20\n")
    assert Path("x", WEIGHTS).read_bytes() == (finished / "runs/sid" / WEIGHTS).read_bytes()


def test_odd_places(tmp_path: Path, monkeypatch: Any) -> None:
    """Spaces, a line break, letters beyond ASCII, a link; neither home nor language."""
    for name in ("HOME", "LANG", "LC_ALL", "TERM"):
        monkeypatch.delenv(name, raising=False)
    odd = tmp_path / " a\nb \u00e9\u4e2d'\"%20"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    monkeypatch.chdir(odd)
    for place in ("x y", str(tmp_path / "link" / "z")):
        args = (*TEACH, "--steps", "2", "--out", place)
        assert fewstep(*args).code == 0
        assert fewstep("sample", place, "--seeds", "0-3", "--out", f"{place}.png").code == 0
    weights = [odd / name / WEIGHTS for name in ("x y", "z")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_interrupted_measurement_leaves_no_number(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Neither from fewer samples nor half a file; the next attempt is whole."""
    shutil.copytree(finished / "runs" / "teacher", tmp_path / "t")
    args = ("evaluate", str(tmp_path / "t"), "--samples", "100", "--draws", "2")
    scores = measure.evaluate

    def stopped(*args: Any) -> Any:
        yield next(iter(scores(*args)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measure, "evaluate", stopped)
        assert fewstep(*args).code == 130
    assert not (tmp_path / "t" / "metrics.json").exists()
    assert fewstep(*args).code == 0
    metrics = json.loads((tmp_path / "t" / "metrics.json").read_text())
    assert metrics["protocol"]["samples"] == 100
    assert metrics["teacher"]["draws"] == 2


def test_another_version_is_told(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The run continues: bit-equality is all that is in doubt.

    A field that the older version of this program did not have counts as its default.
    """
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 5, 15)
        fewstep(*args)
    facts = json.loads(Path("x/run.json").read_text())
    facts["environment"]["torch"] = "2.10.0"
    assert facts["run"].pop("recompute") is False
    Path("x/run.json").write_text(json.dumps(facts))
    told = fewstep(*args)
    assert told.code == 0
    assert told.err.splitlines()[:2] == [
        f"torch was 2.10.0, now {version('torch')}: the rest of the run may differ in the last "
        "bits",
        "continuing from step 5 of 20",
    ]


def test_what_a_death_left_half_written_is_swept(tmp_path: Path, monkeypatch: Any) -> None:
    """Even before run.json was whole: the folder is still free, and clean in the end."""
    monkeypatch.chdir(tmp_path)
    Path("x/grids").mkdir(parents=True)
    for torn in (".run.json.partial-12", "grids/.step-00000000.png.partial-12"):
        Path("x", torn).write_text("{")
    Path("x/.student.partial-12").mkdir()
    assert fewstep(*TINY).code == 0
    assert [p for p in Path("x").rglob("*") if "partial" in p.name] == []


def broken_batch(monkeypatch: Any, first: int) -> None:
    """The sample `first` of a data-free source is not a number."""
    call = Latents.__call__

    def poisoned(self: Latents, draws: Any) -> Any:
        batch = call(self, draws)
        batch.z[draws.index == first] *= float("nan")
        return batch

    monkeypatch.setattr(Latents, "__call__", poisoned)


def test_a_batch_that_is_not_finite_is_told(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> Any:
    """Skipped and counted in the log, with the number of its first sample."""
    monkeypatch.chdir(tmp_path)
    broken_batch(monkeypatch, 5 * 16 + 8 + 3)  # the student's turn of step 6
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    result: Result = fewstep(*args)
    assert result.code == 0
    log = [json.loads(line) for line in Path("x/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["student/loss"] == "nan"] == [6]
    assert [line["skipped"] for line in log] == [0.0] * 5 + [1.0] * 15
    firsts = {key: line[key] for line in log for key in line if key.startswith("skipped.")}
    assert firsts == {"skipped.student": 5 * 16 + 8}
    assert files.read_json(Path("x/checkpoints/step-00000020/manifest.json"))["skipped"] == 1


def starved(batch: int, width: int) -> int:
    """The command in a process that may have 500 MB more than it has now; its exit code."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    small = ("--steps", "4", "--save-every", "2", "--sample-every", "4")
    small = (*small, "--model.net.width", str(width))
    result = fewstep("distill", "mixture", *small, "--batch", str(batch), "--out", "x")
    print(result.err, file=sys.stderr)
    return result.code


@pytest.mark.slow
def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    """A limit of the system, met in the first step: a sentence, no half step."""
    monkeypatch.chdir(tmp_path)
    (ended,) = together(1, tmp_path, starved, 200_000, 1024)
    assert ended.result == 1, ended.err
    assert "fewstep: the memory does not suffice; compute each batch in more parts" in ended.err
    assert not list(Path("x/checkpoints").glob("*"))
    shutil.rmtree("x")
    (ended,) = together(1, tmp_path, starved, 16, 64)
    assert ended.result == 0, ended.err
