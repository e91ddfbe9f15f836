"""The processes of `drill`: one command, in a forked process, that may be killed on its way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fewstep import cli
from fewstep.domains.ring import Ring
from fewstep.storage import checkpoint, files
from fewstep.training import distributed
from fewstep.training.loop import State

STEPS, EVERY = 40, 5
ARGS = (
    *("distill", "mixture", "--steps", str(STEPS), "--save-every", str(EVERY)),
    *("--sample-every", str(STEPS), "--model.net.width", "16", "--model.net.blocks", "1"),
    *("--batch", "16", "--precision", "fp16"),
)
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
"""File operations as the interpreter announces them, each before it is done."""


class Life(NamedTuple):
    """How a process went."""

    code: int
    killed: bool
    told: str
    """Its standard error."""
    seconds: float
    operations: int
    """File operations in its last save."""


def live(
    folder: Path,
    after: float | None = None,
    in_save: tuple[int, int] | None = None,
    hook: Callable[[], None] = lambda: None,
) -> Life:
    """Run the command in `folder`; SIGKILL `after` seconds, or at an operation of a save."""
    told, counted = folder.with_suffix(".err"), folder.with_suffix(".count")
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text("")
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(folder, told, lambda: (_watch_saves(counted, in_save), hook()))
    status = None
    while after is not None and status is None and time.monotonic() - began < after:
        time.sleep(0.002)
        status = os.waitpid(pid, os.WNOHANG)[1] if _ended(pid) else None
    if status is None:
        if after is not None:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    operations = int(counted.read_text() or 0) if counted.exists() else 0
    killed = os.WIFSIGNALED(status)
    return Life(
        -1 if killed else os.waitstatus_to_exitcode(status),
        killed,
        told.read_text(),
        time.monotonic() - began,
        operations,
    )


def _ended(pid: int) -> bool:
    """Whether a child has ended, which leaves it to be waited for."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


def _child(folder: Path, told: Path, hook: Callable[[], Any]) -> None:
    """Never returns. Pictures are measured on few points: that is slow and not drilled here."""
    handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 99
    points = Ring.points
    Ring.points = lambda self, count, seed: points(self, min(count, 300), seed)  # type: ignore
    try:
        hook()
        cli.main([*ARGS, "--out", str(folder)])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _watch_saves(counted: Path, in_save: tuple[int, int] | None) -> None:
    """Count the file operations of each save; die at number in_save[1] of save in_save[0]."""
    write, sync = checkpoint._write, os.fsync
    now = {"save": 0, "operation": 0, "thread": 0}

    def operation() -> None:
        if threading.get_ident() != now["thread"]:
            return
        if in_save is not None and (now["save"], now["operation"]) == in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        now["operation"] += 1

    def watched(*args: Any) -> Path:
        now.update(save=now["save"] + 1, operation=0, thread=threading.get_ident())
        try:
            return write(*args)
        finally:
            now["thread"] = 0
            counted.write_text(str(now["operation"]))

    def synced(handle: int) -> None:
        operation()
        sync(handle)

    checkpoint._write = watched
    files.os.fsync = synced
    sys.addaudithook(lambda event, _: operation() if event in EVENTS else None)


def stops_halfway() -> None:
    """SIGTERM to oneself after half of the steps."""
    ready, done = distributed.heartbeat, iter(range(1, STEPS + 1))

    def alive() -> None:
        ready()
        if next(done) == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    distributed.heartbeat = alive  # type: ignore[assignment]


def _restart(name: str) -> Callable[[State, State], None]:
    return lambda state, fresh: state.nets[name].load_state_dict(fresh.nets[name].state_dict())


def _set(name: str, value: int) -> Callable[[State, State], None]:
    return lambda state, fresh: setattr(state, name, value)


CONTROLS: dict[str, Callable[[State, State], object]] = {
    "nothing": lambda state, fresh: None,
    "the student": _restart("student"),
    "the fake score": _restart("fake"),
    "the average": lambda s, fresh: s.average.load_state_dict(fresh.average.state_dict()),
    "the student's optimiser": lambda state, fresh: state.optimizers.pop("student"),
    "the fake score's optimiser": lambda state, fresh: state.optimizers.pop("fake"),
    "the step": _set("step", STEPS // 2 - 1),
    "images seen": _set("images", 0),
    "samples drawn": _set("drawn", 0),
    "updates skipped": _set("skipped", 7),
    "the loss scales": lambda state, fresh: state.scales.clear(),
    "what rules remember": lambda state, fresh: state.memory.clear(),
}
"""Parts of the state, and how each is forgotten after a checkpoint was read."""


def forgets(name: str) -> None:
    """From now on, resuming loses the part `name`."""
    resume = checkpoint.resume_newest

    def forgetful(folder: Path, state: State, *rest: Any) -> Any:
        from copy import deepcopy

        fresh = deepcopy(state)
        found = resume(folder, state, *rest)
        CONTROLS[name](state, fresh)
        return found

    checkpoint.resume_newest = forgetful
