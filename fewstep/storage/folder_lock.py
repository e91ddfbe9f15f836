"""Folder locks: one process writes to a folder, and only while it is the one that was locked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fewstep.storage.machine_errors import trouble
from fewstep.training.progress import report_progress

WAIT = 0.2
"""Seconds after which a process that waits for a folder looks again."""


@dataclass(eq=False)
class Hold:
    """A folder that this process has locked, identified by its open descriptor, not its path."""

    path: Path
    handle: int
    """An open descriptor of the folder."""

    @property
    def anchor(self) -> Path:
        """A path that leads to the folder wherever it is moved; `path` where there is none."""
        through = Path(f"/proc/self/fd/{self.handle}")
        return through if self._at(through) else self.path

    def elsewhere(self) -> str | None:
        """None while the locked folder is at its path; else its path now, "" if unknown."""
        if self._at(self.path):
            return None
        with suppress(OSError):
            now = self.anchor.readlink()
            if self._at(now):
                return str(now)
        return ""

    def _at(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(self.handle))
        except OSError:
            return False


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[Hold]:
    """Within the block the folder is locked; it is made if it is missing.

    Two locks: on the folder itself, which nobody can delete and keep the folder, and on a file
    .lock in it, for file systems that lock no folders (NFS). Both end with the process.

    wait: wait for another process that has it, as processes of a run do for a cache that the first
    of them fills; by default ValueError. ValueError too where the folder cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if trouble(error):
            raise
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None
    while True:
        with ExitStack() as stack:
            try:
                hold = _lock(path, stack)
            except BlockingIOError:
                hold = None
            except OSError as error:
                raise ValueError(f"cannot write to {path}: {error.strerror}") from None
            if hold is not None:
                yield hold
                return
        if not wait:
            raise ValueError(
                f"{path} is in use by another process; wait for it, or choose another --out"
            )
        report_progress()
        time.sleep(WAIT)


def _lock(path: Path, stack: ExitStack) -> Hold | None:
    """Both locks of a folder, kept by `stack`; None where it was exchanged meanwhile.

    Raises BlockingIOError where another process has one of them.
    """
    import fcntl

    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system that locks no folders
        pass
    file = stack.enter_context((path / ".lock").open("a"))
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    hold = Hold(path, handle)
    same = os.path.samestat((path / ".lock").stat(), os.fstat(file.fileno()))
    return hold if same and hold.elsewhere() is None else None
