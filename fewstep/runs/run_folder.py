"""The folder of one run: what is in it, who may write to it, and how lines are appended.

run.json            the resolved run, its id, where its teacher was, the digests of all that it
                    rests on, the command and the environment
code/               copies of the user's own files that the run is made with, if there are any
log.jsonl           a line for each logged step
gauges.jsonl        a line for each time the student was looked at
grids/              pictures of the same noise over time
checkpoints/        what is needed to continue
averages/           power-function averages, if the run keeps any
best/               the model of the best look, if the run names a metric
student/            the finished model
metrics.json  report.html

A run has a random id, made with its folder; it is in run.json and in the manifest of every
checkpoint, average and model. Which run a folder holds is decided by settings and digests: paths
in run.json are for people, and what moved may be named by its new place.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.config import decode, encode
from fewstep.storage.files import (
    Damaged,
    of_run,
    origin_of,
    read_folder,
    read_json,
    read_lines,
    read_manifest,
    write,
    write_json,
)
from fewstep.storage.folder_lock import Hold, locked

FORMAT = 2
"""Of run.json."""
TORN = (".*.partial-*", ".*.old-*")
"""What was being written, or replaced, when a process was killed."""
KINDS = {
    **dict.fromkeys(("recipe", "teacher", "init", "fake_init", "command"), str),
    **dict.fromkeys(("files", "environment"), dict),
    "distils": bool,
}
"""What run.json holds beside the run, by type; older versions did not write all of it."""
MODELS = ("teacher", "init", "fake_init")
"""What run.json names by folder: whole paths in use, stored relative where inside the run."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    To read it takes the path alone. The process that trains also has the lock `hold`, with which
    `check` refuses to write to a folder that was moved, removed or replaced meanwhile. A
    ValueError, which `Damaged` is too, says what is wrong with a folder.
    """

    path: Path
    hold: Hold | None = None
    """In the process that trains: the lock, without which nothing is written."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What its checkpoints and models say of the run: id, seed, digests."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints that training continues from."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Folder of the finished model."""
        return self.path / "student"

    @property
    def best(self) -> Path:
        """Folder of the model that scored best, if the run names a metric."""
        return self.path / "best"

    @property
    def averages(self) -> Path:
        """Folder of the power-function averages, if the run keeps any."""
        return self.path / "averages"

    @property
    def grids(self) -> Path:
        """Folder of the sample grids, one PNG for each evaluation."""
        return self.path / "grids"

    @property
    def finished(self) -> bool:
        """Whether the run has produced its model, and all files of it are there."""
        try:
            names = read_manifest(self.student)["sha256"]
        except Damaged:
            return False
        return all((self.student / name).is_file() for name in names)

    def complete(self) -> bool:
        """Whether the finished model is there and whole; a ValueError if another run wrote it."""
        try:
            stored = read_folder(self.student)
        except Damaged:
            return False
        of_run(self.student, stored, origin_of(self.facts()))
        return True

    def elsewhere(self) -> str | None:
        """Where the locked folder was moved to: None if it was not, "" if that is unknown."""
        return None if self.hold is None else self.hold.elsewhere()

    def anchored(self) -> RunFolder:
        """The same folder by a path that stays valid when the folder is moved."""
        return self if self.hold is None else replace(self, path=self.hold.anchor)

    def readable(self, text: str) -> str:
        """`text` with the folder's ordinary path in place of the one from `anchored`."""
        return text if self.hold is None else text.replace(str(self.path), str(self.hold.path))

    def check(self) -> None:
        """Before each write: ValueError unless this still is the folder of the run."""
        if self.hold is None:
            return
        now = self.hold.elsewhere()
        if now == "" or (now and self.path == self.hold.path):
            raise ValueError(self.gone(now))
        described = Path(now or self.hold.path) / "run.json"
        try:
            stored = read_json(described)
        except ValueError as error:
            raise ValueError(f"{error}; stopped, and nothing more was written there") from None
        if not isinstance(stored, dict) or stored.get("id") != self.origin.get("run"):
            raise ValueError(
                f"{described} is of another run now; stopped, and nothing more was written there"
            )

    def gone(self, now: str) -> str:
        """The error message for a folder that was moved to `now` ("": removed) during training."""
        old = self.path if self.hold is None else self.hold.path
        if not now:
            return (
                f"{old} was removed, or moved to another disk, while its run trained; stopped, "
                "and nothing was written to what is in its place now"
            )
        return (
            f"{old} was moved to {now} while its run trained; stopped, and nothing was written to "
            f"what is in its place now: it continues with --out {now}"
        )

    def facts(self) -> dict[str, Any]:
        """The contents of run.json, as checked JSON values; `Damaged` where there is no run."""
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
            if stored := facts.setdefault(key, ""):
                facts[key] = str((self.path / stored).resolve())
        return facts

    def refuse_unfinished(self) -> None:
        """Raise ValueError for a run that is not finished; any other folder passes."""
        if (self.path / "run.json").is_file() and not self.finished:
            command = self.facts().get("command", "its command")
            raise ValueError(f"{self.path} is not finished; continue it with: {command}")

    def open(
        self, facts: Mapping[str, Any], places: Sequence[str] = ()
    ) -> tuple[dict[str, Any], bool, list[str]]:
        """Claim the locked folder for the run `facts`.

        Removes files that a killed process left half written, and sets a damaged finished model
        aside.

        Returns the stored run.json, whether an earlier run is continued, and notes for the user.
        For `places` and errors see `continues`.
        """
        continues, notes = self.continues(facts, places), list[str]()
        for folder in (self.path, self.grids):  # of a process that was killed
            for torn in (path for pattern in TORN for path in folder.glob(pattern)):
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        self.grids.mkdir(exist_ok=True)
        if continues:
            self._refuse_mixed()
            if self.student.exists() and not self.complete():
                aside = self.student.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                self.student.rename(aside)
                notes.append(
                    f"{self.student} is damaged or not whole; set aside as {aside.name}, and made "
                    "again from the last checkpoint"
                )
        else:
            stored = {**facts, "id": secrets.token_hex(16)}
            write_json(self.path / "run.json", self._relative(stored))
        return self.facts(), continues, notes

    def _relative(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """`facts` with paths inside the folder made relative, so that it can be moved."""
        stored, home = dict(facts), self.path.resolve()
        for key in MODELS:
            if Path(facts.get(key, "")).is_relative_to(home):
                stored[key] = str(Path(facts[key]).relative_to(home))
        return stored

    def moved(self, facts: Mapping[str, Any]) -> list[str]:
        """Sentences on teachers and data that the same run has at another path now."""
        stored = self.facts()
        pairs = [(key, stored.get(key), facts.get(key)) for key in MODELS]
        old, new = (_filled(each["run"]).get("domain") for each in (stored, facts))
        if isinstance(old, dict) and isinstance(new, dict):
            pairs += [(key, old.get(key), new[key]) for key in new]
        return [
            f"{key} was at {before}, is at {now}" for key, before, now in pairs if before != now
        ]

    def remember(self, facts: Mapping[str, Any]) -> list[str]:
        """Record the present paths of teacher and data; returns the sentences of `moved`."""
        if notes := self.moved(facts):
            stored = {**self.facts(), **{key: facts[key] for key in (*MODELS, "command")}}
            stored["run"] = {**stored["run"], "domain": facts["run"]["domain"]}
            write_json(self.path / "run.json", self._relative(stored))
        return notes

    def again(self, step: int) -> list[str]:
        """A note if the log has lines after `step`, whose steps are repeated; else none."""
        last = self._logged()
        return [f"steps {step + 1} to {last} of the log are done again"] if last > step else []

    def relocate(self, teacher: str) -> None:
        """Record that the teacher is in `teacher` now; the caller has compared digests."""
        with locked(self.path):
            stored = {**self.facts(), "teacher": str(Path(teacher).resolve())}
            write_json(self.path / "run.json", self._relative(stored))

    def _refuse_mixed(self) -> None:
        """Raise ValueError where a model or averages of another run lie in this folder."""
        origin = origin_of(self.facts())
        for path in (self.best, *sorted(self.averages.glob("step-*"))):
            with suppress(Damaged):  # which is told where it is read
                of_run(path, read_manifest(path), origin)

    def note_saved(self, step: int) -> None:
        """Record in run.json that a first checkpoint is on disk."""
        self.check()
        stored = read_json(self.path / "run.json")
        if "saved" not in stored:
            write_json(self.path / "run.json", {**stored, "saved": step})

    def _logged(self) -> int:
        """The last step in the log, 0 for none."""
        steps = (line.get("step") for line in self.lines("log.jsonl"))
        return max((step for step in steps if isinstance(step, int)), default=0)

    def start_anew(self) -> list[str]:
        """Note that a run without a checkpoint starts at step 0 again.

        Raises ValueError where checkpoints existed and are gone, since steps would be lost.
        """
        last = self._logged()
        ended = f"the log ends at step {last}"
        if saved := self.facts().get("saved"):
            raise ValueError(
                f"{self.checkpoints} holds no checkpoint, though one of step {saved} was written "
                f"there ({ended}); put it back, or choose another --out folder to start anew"
            )
        if not last:
            return []
        return [f"no checkpoint was written yet, though {ended}: starting at step 1 again"]

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds something but no run, other than runs in folders of it."""
        if (self.path / "run.json").exists() or not self.path.is_dir():
            return
        torn = (path.name for pattern in TORN for path in self.path.glob(pattern))
        expected = {"grids", ".lock", *torn}
        for name in sorted({p.name for p in self.path.iterdir()} - expected):
            if not (self.path / name / "run.json").exists():
                raise ValueError(
                    f"{self.path} is in use: it holds {name} but no run; "
                    "choose an empty folder with --out"
                )

    def continues(self, facts: Mapping[str, Any], places: Sequence[str] = ()) -> bool:
        """Whether the folder holds the beginning of the run `facts`; nothing is written.

        places: fields of the run's domain that say where files are, whose digests are compared.
        A folder that holds another run, or something else, is refused: nothing is overwritten, but
        for a run that has taken no step, such as one that was refused at its first look.
        """
        self.refuse_foreign()
        if not (self.path / "run.json").exists():
            return False
        earlier = self.facts()
        if earlier.get("format") != FORMAT or not isinstance(earlier.get("id"), str):
            raise ValueError(
                f"{self.path / 'run.json'} has format {earlier.get('format')!r}, or no id; this "
                f"version of fewstep continues runs of format {FORMAT}: choose another --out"
            )
        left = (self.student, self.path / "log.jsonl", *self.checkpoints.glob("*"))
        begun = "saved" in earlier or any(path.exists() for path in left)
        if where := self._difference(earlier, facts, places):
            if not begun:
                return False
            raise ValueError(
                f"{self.path} is in use by a run with other settings ({where}); "
                "choose another folder with --out"
            )
        return True

    def _difference(
        self, earlier: Mapping[str, Any], facts: Mapping[str, Any], places: Sequence[str]
    ) -> str:
        """The first difference between two runs in words; "" where they are one and the same."""
        runs = _placeless(_filled(earlier["run"]), places), _placeless(facts["run"], places)
        if runs[0] != runs[1]:
            return first_difference(*runs, "run")
        if (earlier.get("files") or {}) != (facts.get("files") or {}):
            return first_difference(earlier.get("files"), facts.get("files"), "files")
        old, new = earlier.get("digests") or {}, facts.get("digests") or {}
        for key in sorted(old.keys() | new.keys()):
            if key in old and key in new and old[key] != new[key]:
                what = first_difference(old[key], new[key], f"digests.{key}")
                place = facts.get(key) or "it"
                return f"{place} no longer holds what the run was started with: {what}"
            if old.get(key) != new.get(key):
                both = (earlier, facts) if key in MODELS else (old, new)
                return first_difference(both[0].get(key), both[1].get(key), key)
        return ""

    def changes(self, environment: Mapping[str, str]) -> list[str]:
        """A note if versions or hardware are not those recorded, since bits may then differ."""
        earlier = self.facts().get("environment", {})
        changed = ", ".join(
            f"{key} was {earlier[key]}, now {environment[key]}"
            for key in ("fewstep", "python", "torch", "numpy", "device", "threads")
            if earlier.get(key, environment.get(key)) != environment.get(key)
        )
        return [f"{changed}: the rest of the run may differ in the last bits"] if changed else []

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one JSON line to `name`; all of it, or nothing where it fails."""
        self.check()
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
            self.check()
            write(self.path / name, "".join(f"{line}\n" for line in kept))


def _placeless(run: Any, places: Sequence[str]) -> Any:
    """An encoded run without the fields of its domain that only say where files are."""
    if not isinstance(run, dict) or not isinstance(run.get("domain"), dict):
        return run
    domain = {key: value for key, value in run["domain"].items() if key not in places}
    return {**run, "domain": domain}


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
    values = [v if v or v == 0 else "nothing" for v in short]
    return f"{where} was {values[0]}, now {values[1]}"
