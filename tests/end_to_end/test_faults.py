"""Faults of the machine around one process: disks, memory, clocks, paths, versions.

The table in docs/reliability.md names the test of each fault; several processes are in
tests/distributed, deaths in tools/drill.py, damaged files in test_checkpoint and test_damage.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import checkpoint, files, run_folder
from fewstep.cli import work
from fewstep.data.source import Latents
from fewstep.files import pack, read_folder, unpack, write_folder
from fewstep.runner import Watch
from tests.distributed.processes import results
from tests.end_to_end.command import DISTIL, SMALL, TEACH, Result, fewstep
from tests.end_to_end.test_checkpoint import METHOD, advance, fresh
from tests.end_to_end.test_cli import WEIGHTS, interrupt

TINY = ("train", "digits_teacher", *SMALL, "--steps", "6", "--save-every", "1", "--out", "x")


def failing_saves(monkeypatch: Any, *broken: int) -> None:
    """Saves number `broken`, from 1, find no space."""
    write, calls = checkpoint._write, itertools.count(1)

    def writing(*args: Any) -> Path:
        if next(calls) in broken:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", writing)


def test_a_disk_that_is_full_for_a_while_stops_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Two saves in a row fail, each is told, the third works; the result is the same."""
    monkeypatch.chdir(tmp_path)
    assert fewstep(*TINY[:-1], "undisturbed").code == 0
    failing_saves(monkeypatch, 2, 3)
    code, _, err = fewstep(*TINY)
    assert code == 0
    assert err.count("the last checkpoint could not be written (") == 2
    assert "[Errno 28] No space left on device); trying again now\n" in err
    expected = tmp_path / "undisturbed" / WEIGHTS
    assert (tmp_path / "x" / WEIGHTS).read_bytes() == expected.read_bytes()


def test_a_disk_that_stays_full_stops_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    """At the third failure in a row; what was saved before is whole and continues."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        failing_saves(patch, *range(2, 99))
        stopped = fewstep(*TINY)
    assert stopped.code == 2
    assert stopped.err.endswith("fewstep: No space left on device\n")
    assert [p.name for p in checkpoint.find(Path("x/checkpoints"))] == ["step-00000001"]
    assert fewstep(*TINY).err.startswith("continuing from step 1 of 6\n")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """Two lines are lost, and told; no half line stays."""
    monkeypatch.chdir(tmp_path)
    assert fewstep(*TINY[:-1], "undisturbed").code == 0
    dumps = json.dumps

    def torn(line: Any, **options: Any) -> str:
        text = dumps(line, **options)
        if isinstance(line, dict) and line.get("step") in (3, 4) and "seconds" in line:
            with Path("x/log.jsonl").open("a") as file:
                file.write(text[:9])
            raise OSError(28, "No space left on device")
        return text

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.json, "dumps", torn)
        code, _, err = fewstep(*TINY)
    assert code == 0
    assert "step 3 is not in the log: [Errno 28] No space left on device\n" in err
    log = [json.loads(line)["step"] for line in Path("x/log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 5, 6]
    assert Path("x", WEIGHTS).read_bytes() == Path("undisturbed", WEIGHTS).read_bytes()


def limited(folder: Path) -> tuple[list[str], str]:
    """Files may grow to 4 KB: the kernel refuses the rest, half-way through a file."""
    state = advance(fresh(), 1)
    checkpoint.save(folder, state, METHOD)
    before = read_folder(folder / "step-00000001")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        checkpoint.save(folder, advance(state, 2), METHOD)
        said = "nothing"
    except OSError as error:
        said = str(error)
    assert read_folder(folder / "step-00000001") == before
    return sorted(path.name for path in folder.iterdir()), said


def test_a_file_that_cannot_grow_leaves_the_old_ones(tmp_path: Path) -> None:
    ((names, said),) = results(1, tmp_path, limited, tmp_path / "c")
    assert names == ["step-00000001"]
    assert said == "[Errno 27] File too large"


def test_one_save_at_a_time_and_none_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """A slow disk: training goes on meanwhile, what is written is the state as it was then."""
    started, state = time.perf_counter(), advance(fresh(), 1)
    expected = pack(state.nets.state_dict())
    write, running = checkpoint._write, []

    def slow(*args: Any) -> Path:
        running.append(1)
        assert len(running) == 1
        time.sleep(0.2)
        running.clear()
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", slow)
    with checkpoint.Writer(tmp_path, METHOD) as writer:
        assert writer.save(state) == []
        advance(state, 3)
        assert not checkpoint.find(tmp_path) or time.perf_counter() - started > 0.2
        assert writer.save(state) == []
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000001", "step-00000003"]
    assert (tmp_path / "step-00000001" / "nets.safetensors").read_bytes() == expected


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
    log = Watch.log

    def logging(self: Watch, record: Any) -> None:
        log(self, record)
        if record.step == 3:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "log", logging)
        code, _, err = fewstep(*TINY)
    assert code == 1
    assert err == (
        "fewstep: the memory does not suffice; compute each batch in more parts with "
        "--accumulate, or lower --batch; what was saved is kept\n"
    )
    assert fewstep(*TINY).err.startswith("continuing from step 2 of 6\n")


def test_an_error_of_the_program_is_not_hidden(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def wrong(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Watch, "log", wrong)
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
    for age, path in enumerate(checkpoint.find(Path("x/checkpoints"))):
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
    scores = work.evaluate

    def stopped(*args: Any) -> Any:
        yield next(iter(scores(*args)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "evaluate", stopped)
        assert fewstep(*args).code == 130
    assert not (tmp_path / "t" / "metrics.json").exists()
    assert fewstep(*args).code == 0
    metrics = json.loads((tmp_path / "t" / "metrics.json").read_text())
    assert metrics["protocol"]["samples"] == 100
    assert metrics["teacher"]["draws"] == 2


def test_another_version_is_told(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The run continues: bit-equality is all that is in doubt."""
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 5, 15)
        fewstep(*args)
    facts = json.loads(Path("x/run.json").read_text())
    facts["environment"]["torch"] = "2.10.0"
    Path("x/run.json").write_text(json.dumps(facts))
    told = fewstep(*args)
    assert told.code == 0
    assert told.err.splitlines()[:2] == [
        f"torch was 2.10.0, now {torch.__version__}: the rest of the run may differ in the last "
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
    """Skipped and counted in the log; which samples it was follows from the counter."""
    monkeypatch.chdir(tmp_path)
    broken_batch(monkeypatch, 5 * 16 + 8 + 3)  # the student's turn of step 6
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    result: Result = fewstep(*args)
    assert result.code == 0
    log = [json.loads(line) for line in Path("x/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["student/loss"] == "nan"] == [6]
    assert [line["skipped"] for line in log] == [0.0] * 5 + [1.0] * 15
    assert files.read_json(Path("x/checkpoints/step-00000020/manifest.json"))["skipped"] == 1
