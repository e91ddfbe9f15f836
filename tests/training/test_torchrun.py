"""Under torchrun itself: a lost process is replaced, a slow save is cut off; nothing is lost.

A small script stands for the program, with the fault that its first life meets. Unlike forked
processes these have their own order of everything that is not ordered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.storage import checkpoint
from fewstep.storage.files import read_folder
from tests.processes import free_port, results
from tests.storage.test_checkpoint import METHOD, advance, fresh
from tests.training.test_distributed_faults import ARGS, STUDENT, command

pytestmark = pytest.mark.slow

HOOKED = """
import os, signal, sys, time
from pathlib import Path
from fewstep import cli
from fewstep.storage import checkpoint
from fewstep.training import distributed
from fewstep.runs.monitor import Monitor

Monitor.look = lambda self, state: None
first = not Path("lived").exists()
{fault}
cli.main(sys.argv[1:])
"""
DIES = """
ready, steps = distributed.heartbeat, iter(range(1, 99))
def heartbeat():
    ready()
    if next(steps) == 6 and first and distributed.rank() == 1:
        while not checkpoint.find_checkpoints(Path("run/checkpoints")):
            time.sleep(0.01)
        Path("lived").touch()
        os.kill(os.getpid(), signal.SIGKILL)
distributed.heartbeat = heartbeat
"""
SLOW = """
write = checkpoint._write
def writing(folder, parts, facts, *rest):
    if facts["step"] > 4 and first:
        Path("lived").touch()
        time.sleep(60)
    return write(folder, parts, facts, *rest)
checkpoint._write = writing
"""


def launch(home: Path, fault: str, size: int, *flags: str) -> subprocess.Popen[bytes]:
    """The command in `home`, under torchrun."""
    (home / "hooked.py").write_text(HOOKED.format(fault=fault))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(size))
    own = ("--master-port", str(free_port()), *flags, "hooked.py", *ARGS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    err = (home / "err").open("a")
    return subprocess.Popen(
        [sys.executable, *launcher, *own], cwd=home, stderr=err, env=environment
    )


def ends(run: subprocess.Popen[bytes]) -> int:
    """Its exit code; ended by hand after five minutes."""
    try:
        return run.wait(300)
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(40)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What one process makes undisturbed, and what two do."""
    made = []
    for size in (1, 2):
        home = tmp_path_factory.mktemp(str(size))
        results(size, home, command, home)
        made.append((home / STUDENT).read_bytes())
    return made


def test_a_lost_process_is_replaced(students: list[bytes], tmp_path: Path) -> None:
    """SIGKILL to one of two in step 6: torchrun starts both anew, and the command continues."""
    code = ends(launch(tmp_path, DIES, 2, "--max-restarts", "3"))
    told = (tmp_path / "err").read_text()
    assert code == 0, told
    assert "continuing from step 4 of 12" in told
    assert (tmp_path / STUDENT).read_bytes() == students[1]


def test_a_save_that_is_cut_off_loses_nothing_older(students: list[bytes], tmp_path: Path) -> None:
    """A minute's save after SIGTERM and one second of grace: the checkpoint of step 4 serves."""
    run = launch(tmp_path, SLOW, 1, "--shutdown-timeout", "1")
    for _ in range(1200):
        time.sleep(0.05)
        if (tmp_path / "lived").exists():
            break
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert ends(run) != 0
    assert time.monotonic() - began < 30
    (newest,) = checkpoint.find_checkpoints(tmp_path / "run/checkpoints")
    assert read_folder(newest)["step"] == 4
    assert ends(launch(tmp_path, SLOW, 1)) == 0, (tmp_path / "err").read_text()
    assert "continuing from step 4 of 12" in (tmp_path / "err").read_text()
    assert (tmp_path / STUDENT).read_bytes() == students[0]


def test_a_save_slower_than_the_grace_is_told(tmp_path: Path, monkeypatch: object) -> None:
    """Once, after the first checkpoint that shows it; not under no launcher, nor with time."""
    assert isinstance(monkeypatch, pytest.MonkeyPatch)
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (time.sleep(0.2), write(*args))[1])
    state, told = advance(fresh(), 1), []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert checkpoint.grace() == float("inf")
    for seconds in ("", "0.25", "100"):
        if seconds:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
            monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
        with checkpoint.Writer(tmp_path, METHOD) as writer:
            told.append([note for _ in range(3) for note in writer.save(state)])
    assert [len(notes) for notes in told] == [0, 1, 0]
    assert "a checkpoint took 0 s, and torchrun kills 0 s after SIGTERM; give it" in told[1][0]
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert checkpoint.grace() == 30.0
