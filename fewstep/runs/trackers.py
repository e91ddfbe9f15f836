"""The numbers and pictures of a run in a tracker: TensorBoard, Weights & Biases or MLflow.

What is tracked are the files that every run writes: the lines of log.jsonl and gauges.jsonl, and
the grids. A tracker therefore holds the very values of the log, whatever is added to the log is
tracked too, and a run that began without a tracker brings it up to date when it continues with
one. Nothing leaves the machine unless the person's own environment says so:

    tensorboard   RUN/tensorboard
    wandb         RUN/wandb, in offline mode unless WANDB_MODE is set; `wandb sync` uploads it
    mlflow        RUN/mlflow, a store of files, unless MLFLOW_TRACKING_URI is set

RUN/tracking.json remembers which run of the tracker this is and how far it is, so that a
continued run goes on in the same one. A tracker that fails is given up, with one sentence; the
training is never stopped by it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fewstep.runs.run_folder import RunFolder
from fewstep.storage.bounded_reading import json_value
from fewstep.storage.files import read_json, write_json

PROJECT = "fewstep"
FILES = {"log.jsonl": "", "gauges.jsonl": "look/"}
"""What is followed, and what the names of its numbers begin with."""
LONGEST_PARAMETER = 500
"""Characters of a setting that MLflow is given as a parameter; run.json is stored beside them."""


class Tracker(Protocol):
    """One run in a tracker."""

    run: str
    """How the tracker finds this run again; "" where its folder is enough."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step."""

    def picture(self, step: int, path: Path) -> None:
        """Write a PNG file as the sample grid of a step."""

    def rewind(self, step: int) -> None:
        """The steps after `step` follow once more, with other numbers than before."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files, by torch's own writer."""

    def __init__(self, folder: Path, run: str, facts: Mapping[str, Any], step: int) -> None:
        self.run, self.folder = "", folder / "tensorboard"
        self.writer = self._writer(step + 1 if step else None)

    def _writer(self, purge: int | None) -> Any:
        make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return make(str(self.folder), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self._writer(step + 1)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B; its steps are a number of ours, since W&B's own cannot go back."""

    def __init__(self, folder: Path, run: str, facts: Mapping[str, Any], step: int) -> None:
        self.wandb = importlib.import_module("wandb")
        self.run = run or facts["id"]
        self.writer = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run,
            name=folder.resolve().name,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            config={"recipe": facts.get("recipe", ""), **facts["run"]},
            settings=self.wandb.Settings(silent=True, console="off"),
        )
        self.writer.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.log({**values, "step": step})

    def picture(self, step: int, path: Path) -> None:
        self.writer.log({"samples": self.wandb.Image(str(path)), "step": step})

    def rewind(self, step: int) -> None:
        """Nothing to do: later values of a step stand beside the earlier ones."""

    def close(self) -> None:
        self.writer.finish()


class MLflow:
    """A run of MLflow, by its client, which touches no global state."""

    def __init__(self, folder: Path, run: str, facts: Mapping[str, Any], step: int) -> None:
        self.entities = importlib.import_module("mlflow.entities")
        where = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not where:  # newer versions want to be told that a store of files is meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            where = (folder / "mlflow").resolve().as_uri()
        self.client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=where)
        self.run = run
        if run:
            self.client.update_run(run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        made = self.client.create_run(number, run_name=folder.resolve().name)
        self.run = made.info.run_id
        settings = {"recipe": facts.get("recipe", ""), **dict(_leaves(facts["run"], "."))}
        parameters = [
            self.entities.Param(name, str(value))
            for name, value in settings.items()
            if len(str(value)) <= LONGEST_PARAMETER
        ]
        for first in range(0, len(parameters), 100):
            self.client.log_batch(self.run, params=parameters[first : first + 100])
        self.client.log_artifact(self.run, str(folder / "run.json"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        each = [self.entities.Metric(name, v, now, step) for name, v in values.items()]
        self.client.log_batch(self.run, metrics=each)

    def picture(self, step: int, path: Path) -> None:
        self.client.log_artifact(self.run, str(path), "grids")

    def rewind(self, step: int) -> None:
        """Nothing to do: MLflow keeps all values of a step, the newest last."""

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: dict[str, tuple[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "mlflow": ("mlflow", MLflow),
}
"""Name -> the package it needs, and the class."""


def require_trackers(names: Sequence[str]) -> None:
    """ValueError, with the line that installs it, where a tracker's package is missing."""
    for name in names:
        package = TRACKERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--track {name} needs the package {package}; install it with: "
                f"pip install {package}"
            )


class Tracking:
    """The trackers of one run folder; `follow` after each step brings them up to date.

    A run that is continued goes on in the same run of each tracker. Both methods return a
    sentence for each tracker that failed, which is left out from then on; they raise nothing.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.followers: dict[str, Follower | None] = dict.fromkeys(names)

    def follow(self) -> list[str]:
        """Write what is new in the run's files."""
        return self._each(self._follow)

    def close(self) -> list[str]:
        """Write what is pending, and remember how far the trackers are."""
        return self._each(self._close)

    def _follow(self, name: str) -> None:
        follower = self.followers[name] or Follower(name, self.folder)
        self.followers[name] = follower
        follower.follow()

    def _close(self, name: str) -> None:
        if follower := self.followers[name]:
            follower.close()

    def _each(self, act: Callable[[str], object]) -> list[str]:
        notes = []
        for name in list(self.followers):
            try:
                act(name)
            except Exception as error:  # whatever a tracker raises, the training goes on
                del self.followers[name]
                what = " ".join(str(error).split())[:300] or type(error).__name__
                notes.append(f"--track {name} failed and is left out, the run goes on: {what}")
        return notes


class Follower:
    """One tracker, and how much of the run's files it has."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, RunFolder(folder)
        self.facts = self.folder.facts()
        stored = self._stored().get(name, {})
        self.last = {what: int(stored.get(what, -1)) for what in (*FILES, "grids")}
        """The last step that the tracker has of each file, and of the pictures."""
        self.read = dict.fromkeys(FILES, 0)
        """Bytes of each file that were read by this process."""
        self.listed = 0
        self.stale: dict[Path, int] = {}
        """Pictures of steps that are done again, with the time they were written at."""
        step = max(0, *self.last.values())
        self.tracker = TRACKERS[name][1](folder, str(stored.get("run", "")), self.facts, step)
        self._store()

    def follow(self) -> None:
        """Write the lines and pictures that are new."""
        before = {**self.last}
        for file, prefix in FILES.items():
            for line in self._lines(file):
                step = line.get("step")
                if isinstance(step, int) and step > self.last[file]:
                    values = {prefix + name: value for name, value in numbers(line)}
                    self.tracker.scalars(step, values)
                    self.last[file] = step
        for step, path in self._pictures():
            self.tracker.picture(step, path)
            self.last["grids"] = step
        if any(self.last[what] != before[what] for what in ("gauges.jsonl", "grids")):
            self._store()

    def close(self) -> None:
        """Write what is pending."""
        self.tracker.close()
        self._store()

    def _lines(self, file: str) -> list[dict[str, Any]]:
        """The lines that are new in a file.

        A file that became shorter was taken back to a checkpoint, and other numbers follow.
        """
        path = self.folder.path / file
        size = path.stat().st_size if path.exists() else 0
        if size < self.read[file]:
            self._rewind(file)
        if size == self.read[file]:
            return []
        with path.open("rb") as stream:
            stream.seek(self.read[file])
            whole = stream.read(size - self.read[file]).rpartition(b"\n")
        self.read[file] += len(whole[0]) + len(whole[1])
        found = [json_value(text) for text in whole[0].split(b"\n") if text.strip()]
        return [line for line in found if isinstance(line, dict)]

    def _rewind(self, file: str) -> None:
        """The tracker has steps that the run has left, and is to take others in their place."""
        self.read[file] = 0
        lines = (line for name in FILES for line in self.folder.lines(name))
        end = max((line.get("step", 0) for line in lines), default=0)
        if max(self.last.values()) <= end:
            return
        self.tracker.rewind(end)
        self.last = {what: min(step, end) for what, step in self.last.items()}
        self.stale = {path: path.stat().st_mtime_ns for path in self.folder.grids.glob("*.png")}

    def _pictures(self) -> list[tuple[int, Path]]:
        """The grids of steps that the tracker has no picture of."""
        grids = self.folder.grids
        changed = grids.stat().st_mtime_ns if grids.exists() else 0
        if changed == self.listed:
            return []
        self.listed, found = changed, []
        for path in sorted(grids.glob("step-*.png")):
            number = path.stem.removeprefix("step-")
            if not number.isdecimal() or int(number) <= self.last["grids"]:
                continue
            if self.stale.get(path) != path.stat().st_mtime_ns:
                found.append((int(number), path))
        return found

    def _stored(self) -> dict[str, Any]:
        """What tracking.json tells of this run, by tracker."""
        with suppress(ValueError):
            known = read_json(self.folder.path / "tracking.json")
            if isinstance(known, dict) and known.get("id") == self.facts.get("id"):
                return {name: value for name, value in known.items() if isinstance(value, dict)}
        return {}

    def _store(self) -> None:
        """Record which run of the tracker this is, and how far."""
        known = {**self._stored(), self.name: {"run": self.tracker.run, **self.last}}
        write_json(self.folder.path / "tracking.json", {"id": self.facts.get("id"), **known})


def numbers(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a line but its step: {"a": {"b": 1}} -> [("a/b", 1.0)]; "nan" is one."""
    found = []
    for name, value in _leaves(line, "/"):
        if isinstance(value, bool) or name == "step":
            continue
        with suppress(TypeError, ValueError):
            found.append((name, float(value)))
    return found


def _leaves(value: Any, joint: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON tree by their names."""
    if isinstance(value, dict):
        inner: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list):
        inner = iter(enumerate(value))
    else:
        yield name, value
        return
    for key, child in inner:
        yield from _leaves(child, joint, f"{name}{joint}{key}" if name else str(key))
