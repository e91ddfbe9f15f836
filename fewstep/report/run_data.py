"""Read the small files of a run folder for a report, checking every value.

A run may be unfinished, unmeasured, or without gauges; then lists are empty and numbers are nan.
A folder that is no run is refused with a sentence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from fewstep.config import conform, known
from fewstep.eval.features import retitled
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.bounded_reading import json_value
from fewstep.storage.files import Damaged, digest, read_json
from fewstep.teachers.diffusers.network import DiffusersNet

Line = Mapping[str, Any]
Scores = dict[str, dict[str, float]]
COMPARED = ("features", "labels", "samples")
"""What two evaluations must share to stand side by side."""
TEXTS = (*COMPARED, "model")
"""What of an evaluation is a text or a number."""
EVALUATION = ("best", "mean", "std", "reference")
"""What an evaluation holds beside its runs."""


def number(line: Line | None, key: str) -> float:
    """line[key] as a float, "inf" and "nan" included; nan for anything that is no number."""
    value = None if line is None else line.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def whole(line: Line | None, key: str) -> int:
    """line[key] as a whole number; 0 for anything that is no finite number."""
    value = number(line, key)
    return int(value) if math.isfinite(value) else 0


@dataclass(frozen=True)
class RunData:
    """The contents of one run folder."""

    path: Path
    facts: dict[str, Any]
    log: list[dict[str, Any]]
    gauges: list[dict[str, Any]]
    metrics: Scores
    """{"real": ..., "teacher": ..., "student": ...}, or empty."""
    protocol: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    """What `fewstep evaluate` stored with --protocol or --prompts, by the name of its file."""
    finished: bool
    repeats: tuple[RunData, ...] = ()
    """The same run with other seeds, where a report was given them."""

    @property
    def run(self) -> dict[str, Any]:
        """The run, as encoded in run.json."""
        run: dict[str, Any] = self.facts["run"]
        return run

    @property
    def model(self) -> Mapping[str, Any]:
        """The encoded `Model` of the run; empty where that is damaged."""
        model = self.run.get("model")
        return model if isinstance(model, Mapping) else {}

    @property
    def prompted(self) -> bool:
        """Whether the model of the run takes prompts and makes latents."""
        net = self.model.get("net")
        return isinstance(net, Mapping) and net.get("type") == DiffusersNet.__name__

    @property
    def method(self) -> str:
        """The name of the method."""
        method = self.run.get("method")
        return str(method.get("type", "?")) if isinstance(method, Mapping) else "?"

    @property
    def role(self) -> str:
        """What the run makes: "student", or "teacher" where it trains on data."""
        if "student" in self.metrics or self.facts.get("distils") is True:
            return "student"
        if self.facts.get("distils") is False:
            return "teacher"
        output = getattr(known().get(self.method), "output", "student")
        return "student" if output == "student" else "teacher"

    @property
    def steps(self) -> int:
        """The number of training steps of the run."""
        return whole(self.run, "steps")

    @property
    def done(self) -> int:
        """Steps logged so far."""
        return int(max(finite(self.log, "step"), default=0))

    @property
    def images(self) -> int:
        """Samples the result has been updated on."""
        return int(max(finite(self.log, "images"), default=0))

    @property
    def skipped(self) -> int:
        """Updates that were skipped."""
        return int(max(finite(self.log, "skipped"), default=0))

    @property
    def seconds(self) -> float:
        """Time spent training; the clock starts anew where a run was continued."""
        total, last = 0.0, 0.0
        for now in finite(self.log, "seconds"):
            total += last if now < last else 0.0
            last = now
        return total + last

    @property
    def nets(self) -> list[str]:
        """The nets that were trained, in the order of their turns."""
        keys = [key for line in self.log for key in line if key.endswith("/loss")]
        return [key.removesuffix("/loss") for key in dict.fromkeys(keys)]

    @property
    def distance(self) -> str:
        """The name of the Frechet distance, "" where nothing was measured."""
        return str(self.protocol.get("distance", ""))

    @property
    def last(self) -> dict[str, Any] | None:
        """The last evaluation of the student, a line of gauges.jsonl."""
        return self.gauges[-1] if self.gauges else None

    def levels(self, look: Line | None) -> list[dict[str, Any]]:
        """The gauges by noise level of one evaluation."""
        levels = look.get("levels") if look else None
        return [x for x in levels if isinstance(x, dict)] if isinstance(levels, list) else []

    def score(self, role: str, name: str) -> float:
        """The mean of a measured score, or nan."""
        return number(self.metrics.get(role), name)

    @property
    def beside(self) -> dict[str, dict[str, Any]]:
        """Evaluations of the teacher's pipeline that are comparable with the run's own.

        Of the same prompts, as many, in the same features; guided or not.
        """
        alike = {tuple(map(e.get, COMPARED)) for e in self.evaluations.values()}
        stored: dict[str, dict[str, Any]] = {}
        with suppress(ValueError, OSError):
            stored = _evaluations(Path(f"{self.facts.get('teacher')}.evaluation"))
        return {file: e for file, e in stored.items() if tuple(map(e.get, COMPARED)) in alike}

    def still(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether an evaluation is of the finished model as it is now."""
        manifest = self.path / "student" / "manifest.json"
        return self.finished and evaluation.get("model") == digest(manifest)


def on_prompts(file: str) -> bool:
    """Whether the evaluation of that name is one of `fewstep evaluate --prompts`."""
    return file.startswith("prompts-")


def finite(lines: Iterable[Line], key: str) -> list[float]:
    """The finite numbers under `key`."""
    values = (number(line, key) for line in lines)
    return [value for value in values if math.isfinite(value)]


def read_run(path: Path) -> RunData:
    """Read the run folder `path`; a `Damaged` (ValueError) says what is wrong with it."""
    folder = RunFolder(path)
    facts = folder.facts()
    _scalars(path, facts["run"])
    metrics, protocol = _metrics(path / "metrics.json")
    log, gauges = (
        [line for line in folder.lines(name) if math.isfinite(number(line, "step"))]
        for name in ("log.jsonl", "gauges.jsonl")
    )
    evaluations = _evaluations(path / "evaluation")
    return RunData(path, facts, log, gauges, metrics, protocol, evaluations, folder.finished)


def read_state(path: Path) -> RunData:
    """How far the run has come: its settings and the last lines of its log, and nothing else.

    It costs the same however long the run is; a `Damaged` (ValueError) says what is wrong with it.
    """
    folder = RunFolder(path)
    log = [x for x in last_lines(path / "log.jsonl") if math.isfinite(number(x, "step"))]
    return RunData(path, folder.facts(), log, [], {}, {}, {}, folder.finished)


def last_lines(path: Path, size: int = 1 << 16) -> list[dict[str, Any]]:
    """The whole lines in the last `size` bytes of a file of JSON lines; none if it is missing."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            parts = file.read().split(b"\n")[:-1]  # the last is not whole
    except FileNotFoundError:
        return []
    found = []
    for part in parts if end <= size else parts[1:]:
        with suppress(ValueError):  # a line that is being written, or is damaged
            line = json_value(part)
            found += [line] if isinstance(line, dict) else []
    return found


def _scalars(path: Path, run: Mapping[str, Any]) -> None:
    """A `Damaged` where a number, a text or a switch of the run is none; parts are not looked at.

    Those may be of a class that is not known here, and of settings of another version.
    """
    for name, hint in get_type_hints(Run).items():
        if name in run and (hint in (int, float, str, bool) or get_origin(hint) is Literal):
            try:
                conform(run[name], hint, f"Run.{name}")
            except ValueError as error:
                raise Damaged(f"{path / 'run.json'} does not describe a run: {error}") from None


def _metrics(path: Path) -> tuple[Scores, dict[str, Any]]:
    """(scores by role, protocol); both empty where nothing was measured."""
    if not path.is_file():
        return {}, {}
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise Damaged(f"{path} does not hold scores by role")
    protocol = stored.pop("protocol", {})
    scores = {
        role: {name: number(values, name) for name in values} for role, values in stored.items()
    }
    return scores, protocol


def _evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of `fewstep evaluate --protocol` and `--prompts`, by file."""
    by_file = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        stored = read_json(path)
        parts = [stored.get(key) for key in EVALUATION] if isinstance(stored, dict) else [None]
        runs = stored.get("runs") if all(isinstance(part, dict) for part in parts) else None
        texts = [stored.get(key, "") for key in TEXTS] if isinstance(runs, list) else [None]
        sound = all(isinstance(text, (str, int)) for text in texts)
        if not (sound and runs and all(isinstance(run, dict) for run in runs)):
            raise Damaged(f"{path} does not hold an evaluation")
        by_file[path.stem] = _named(stored)
    return by_file


def _named(stored: dict[str, Any]) -> dict[str, Any]:
    """An evaluation whose scores have the names that they have earned, whoever wrote it."""

    def named(scores: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name if name == "seeds" else retitled(name, features, samples): value
            for name, value in scores.items()
        }

    features, samples = str(stored.get("features")), stored.get("samples")
    runs = {"runs": [named(run) for run in stored["runs"]]}
    return {**stored, **runs, **{key: named(stored[key]) for key in ("best", "mean", "std")}}
