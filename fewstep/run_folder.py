"""The folder of one run: what is in it, who may write to it, and how lines are appended.

run.json            the resolved run, its teacher, the command and the environment
code/               copies of the user's own files that the run is made with, if there are any
log.jsonl           a line for each logged step
gauges.jsonl        a line for each time the student was looked at
grids/              pictures of the same noise over time
checkpoints/        what is needed to continue
averages/           power-function averages, if the run keeps any
best/               the model of the best look, if the run names a metric
student/            the finished model
metrics.json  report.html
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.files import Damaged, read_json, read_lines, write, write_json
from fewstep.machine import trouble
from fewstep.preparation import progress
from fewstep.spec import decode, encode

TORN = ".*.partial-*"
"""What was being written when a process was killed."""
WAIT = 0.2
"""Seconds after which a process that waits for a folder looks again."""
KINDS = {
    **dict.fromkeys(("recipe", "teacher", "init", "command"), str),
    **dict.fromkeys(("files", "environment"), dict),
    "distils": bool,
}
"""What run.json holds beside the run, by type; older versions did not write all of it."""
MODELS = ("teacher", "init")
"""What run.json names by folder: whole paths in use, stored relative where inside the run."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def averages(self) -> Path:
        return self.path / "averages"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def finished(self) -> bool:
        """Whether the run has produced its model."""
        return (self.student / "manifest.json").is_file()

    def facts(self) -> dict[str, Any]:
        """run.json; a ValueError says so where the folder is no run."""
        if not (self.path / "run.json").is_file():
            raise Damaged(f"{self.path} is not a run folder (no run.json in it)")
        facts = read_json(self.path / "run.json")
        if not isinstance(facts, dict) or not isinstance(facts.get("run"), dict):
            raise Damaged(f"{self.path / 'run.json'} does not describe a run")
        for key, kind in KINDS.items():
            if not isinstance(facts.get(key, kind()), kind):
                raise Damaged(
                    f"{self.path / 'run.json'} does not describe a run: {key} is "
                    f"{str(facts[key])[:60]!r}"
                )
        for key in MODELS:
            if isinstance(stored := facts.get(key), str) and stored:
                facts[key] = str((self.path / stored).resolve())
        return facts

    def refuse_unfinished(self) -> None:
        """Refuse a run that has not come to its end; what is no run folder passes."""
        if (self.path / "run.json").is_file() and not self.finished:
            command = self.facts().get("command", "its command")
            raise ValueError(f"{self.path} is not finished; continue it with: {command}")

    def open(self, facts: Mapping[str, Any]) -> bool:
        """Claim the (locked) folder for the run `facts`; whether it continues an earlier one."""
        continues = self.continues(facts)
        for folder in (self.path, self.grids):  # of a process that was killed
            for torn in folder.glob(TORN):
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        if not continues:
            self.grids.mkdir(exist_ok=True)
            stored, home = dict(facts), self.path.resolve()
            for key in MODELS:
                if Path(facts.get(key, "")).is_relative_to(home):  # the folder can be moved whole
                    stored[key] = str(Path(facts[key]).relative_to(home))
            write_json(self.path / "run.json", stored)
        return continues

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds something but no run, other than runs in folders of it."""
        if (self.path / "run.json").exists() or not self.path.is_dir():
            return
        ours = {"grids", ".lock", *(p.name for p in self.path.glob(TORN))}
        for name in sorted({p.name for p in self.path.iterdir()} - ours):
            if not (self.path / name / "run.json").exists():
                raise ValueError(
                    f"{self.path} is in use: it holds {name} but no run; "
                    "choose an empty folder with --out"
                )

    def continues(self, facts: Mapping[str, Any]) -> bool:
        """Whether the folder holds the beginning of the run `facts`; nothing is written.

        A folder that holds another run, or something else, is refused: nothing is overwritten, but
        for a run that has taken no step, such as one that was refused at its first look.
        """
        self.refuse_foreign()
        if not (self.path / "run.json").exists():
            return False
        begun = (
            self.finished or (self.path / "log.jsonl").exists() or any(self.checkpoints.glob("*"))
        )
        earlier = self.facts()
        earlier["run"] = _filled(earlier["run"])
        for key in ("run", "files", *MODELS):
            if (earlier.get(key) or "") != (facts.get(key) or ""):
                if not begun:
                    return False
                where = first_difference(earlier.get(key), facts.get(key), key)
                raise ValueError(
                    f"{self.path} is in use by a run with other settings ({where}); "
                    "choose another folder with --out"
                )
        return True

    def changes(self, environment: Mapping[str, str]) -> str:
        """What bit-equality rests on and is not what it was: "torch was 2.12.0, now 2.13.0"."""
        earlier = self.facts().get("environment", {})
        return ", ".join(
            f"{key} was {earlier[key]}, now {environment[key]}"
            for key in ("fewstep", "python", "torch", "numpy", "device", "threads")
            if earlier.get(key, environment.get(key)) != environment.get(key)
        )

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one JSON line to `name`; all of it, or nothing where it fails."""
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of `name`, none if it is missing; a torn last line is left out."""
        yield from read_lines(self.path / name)

    def rewind(self, name: str, step: int) -> None:
        """Drop the lines of `name` after `step`: they will be written again."""
        kept = [json.dumps(line) for line in self.lines(name) if line.get("step", 0) <= step]
        if (self.path / name).exists():
            write(self.path / name, "".join(f"{line}\n" for line in kept))


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder: a second process that wants it is refused; released even by a crash.

    wait: it waits instead, as processes of a run do for a cache that the first of them fills.
    """
    import fcntl

    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a")
    except OSError as error:
        if trouble(error):
            raise
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not (wait and isinstance(error, BlockingIOError)):
                    raise ValueError(
                        f"{path} is in use by another process; wait for it, or choose another "
                        "--out"
                    ) from None
            progress()
            time.sleep(WAIT)
        yield


def _filled(run: Any) -> Any:
    """A stored run with the fields that this version added to it, at their defaults."""
    try:
        return encode(decode(run))
    except ValueError:  # fields that are no more: the difference will be told
        return run


def first_difference(old: Any, new: Any, where: str) -> str:
    """ "run.method.alpha was 1.2, now 1.0": the first place where two JSON trees differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for key in new:
            if old.get(key) != new[key]:
                return first_difference(old.get(key), new[key], f"{where}.{key}")
    short = [v.get("type", v) if isinstance(v, dict) else v for v in (old, new)]
    told = [v if v or v == 0 else "nothing" for v in short]
    return f"{where} was {told[0]}, now {told[1]}"
