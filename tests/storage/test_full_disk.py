"""A disk that is full, for a while or for good, or slow: what is stored stays whole."""

from __future__ import annotations

import itertools
import json
import resource
import time
from pathlib import Path
from typing import Any

from fewstep.runs import run_folder
from fewstep.storage import checkpoint
from fewstep.storage.files import pack, read_folder
from tests.cli.test_cli import WEIGHTS
from tests.command import SMALL, fewstep
from tests.processes import results
from tests.storage.test_checkpoint import METHOD, advance, fresh

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
    assert stopped.code == 1
    assert "fewstep: No space left on device; free some space" in stopped.err.splitlines()[-1]
    assert [p.name for p in checkpoint.find_checkpoints(Path("x/checkpoints"))] == [
        "step-00000001"
    ]
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
    assert said.startswith("[Errno 27] File too large: '")


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
        assert not checkpoint.find_checkpoints(tmp_path) or time.perf_counter() - started > 0.2
        assert writer.save(state) == []
    assert [path.name for path in checkpoint.find_checkpoints(tmp_path)] == [
        "step-00000001",
        "step-00000003",
    ]
    assert (tmp_path / "step-00000001" / "nets.safetensors").read_bytes() == expected
