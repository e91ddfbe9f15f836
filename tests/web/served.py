"""A playground in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import fewstep
from tests.hostile_requests import Door


class Served:
    """`fewstep serve ARGS`, or another verb, in a folder, until the block ends."""

    def __init__(self, home: Path, *args: str, verb: str = "serve") -> None:
        self.home, self.args, self.verb = home, args, verb

    def __enter__(self) -> Served:
        paths = {"PYTHONPATH": str(Path(fewstep.__file__).parent.parent)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fewstep", self.verb, *self.args],
            cwd=self.home,
            env={**os.environ, **paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        start, _, token = self.address.partition("/?token=")
        self.door = Door(int(start.rpartition(":")[2]), token)
        return self

    def stop(self) -> tuple[int, str]:
        """End it as Ctrl-C does; its exit code, and what it said on standard error."""
        self.process.send_signal(2)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
