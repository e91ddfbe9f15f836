"""Checkpoints: everything a run needs to continue, in safetensors and JSON.

    checkpoints/step-00000500/
        nets.safetensors  average.safetensors  optim-student.safetensors  ...  manifest.json

A checkpoint is written under another name and renamed when complete; its manifest holds the
digest of every file, checked before a weight is used, and the id of the run that wrote it: a
checkpoint of another run is refused. At least two are kept, so that a damaged newest one is set
aside and the one before it serves.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.distillation.method import Method
from fewstep.storage.files import Damaged, nothing, of_run, pack, read_folder, unpack, write_folder
from fewstep.storage.model_folder import load_weights
from fewstep.training import distributed
from fewstep.training.loop import State
from fewstep.training.optim import Optim
from fewstep.training.precision import Scale

COUNTERS = ("step", "images", "drawn", "skipped", "streak")
RETRIES = 3
"""Checkpoints in a row that may fail to be written before the run stops."""


Parts = dict[str, dict[str, Tensor]]
"""File -> name -> tensor."""


def tensors(state: State) -> Parts:
    """Every tensor of `state`, as file -> name -> tensor."""
    parts = {"nets": state.nets.state_dict(), "average": state.average.state_dict()}
    parts |= {f"optim-{name}": _flatten(optim) for name, optim in state.optimizers.items()}
    return parts


def require_equal_state(state: State) -> None:
    """Raise `RanksDiffer` unless all processes hold the same state to the bit."""
    parts = tensors(state)
    named = {f"{part}.{name}": t for part in parts for name, t in parts[part].items()}
    distributed.require_equal_ranks(named, f"at step {state.step}")


Spare = Callable[[int], bool]
"""Whether the checkpoint of a step stays when newer ones are there."""


def none(step: int) -> bool:
    """The default `Spare`: no old checkpoint is kept."""
    return False


def save(folder: Path, state: State, method: Method, keep: int = 2) -> Path:
    """Write `state` under folder/step-N and delete all but the newest `keep`; returns the path.

    Half-written folders of killed processes are deleted too: a run folder has one writer.
    """
    parts, facts = _snapshot(state, method)
    return _write(folder, parts, facts, keep, none)


def _snapshot(state: State, method: Method) -> tuple[Parts, dict[str, Any]]:
    """Copies of all tensors in main memory, and the facts of the manifest, at this step.

    All ranks take part in gathering sharded tensors, one after another, so that no accelerator
    holds more than one whole; rank 0 alone keeps them.
    """
    parts: Parts = {}
    for name, part in tensors(state).items():
        parts[name] = {}
        for key, t in part.items():
            whole = distributed.full_tensor(t).detach()
            if distributed.rank() == 0:
                parts[name][key] = whole.to("cpu", copy=True)
    facts: dict[str, Any] = {key: getattr(state, key) for key in COUNTERS}
    facts["scales"] = {net: [scale.value, scale.clean] for net, scale in state.scales.items()}
    facts["restarts"] = {net: list(began) for net, began in state.restarts.items()}
    facts["memory"] = {name: list(numbers) for name, numbers in state.memory.items()}
    facts["method"] = repr(method)
    return parts, facts


def _write(
    folder: Path,
    parts: Parts,
    facts: Mapping[str, Any],
    keep: int,
    spare: Spare,
    check: Callable[[], None] = nothing,
) -> Path:
    files = {f"{name}.safetensors": pack(part) for name, part in parts.items()}
    target = checkpoint_path(folder, facts["step"])
    write_folder(target, files, facts, check)
    check()
    old = [path for path in find_checkpoints(folder)[:-keep] if not spare(step_of(path))]
    _delete([*folder.glob(".step-*-*"), *old])
    return target


def _delete(paths: Iterable[Path]) -> None:
    """Rename, then delete, so that no half-deleted folder has a checkpoint's name."""
    for path in paths:
        aside = path.with_name(f".{path.name.lstrip('.')}.old-{os.getpid()}")
        path.replace(aside)
        shutil.rmtree(aside)


class Writer:
    """Write checkpoints while training goes on: copied to memory at once, to disk in a thread.

    All ranks call it, rank 0 writes. At most one write is under way. A failure, such as a full
    disk, is reported by the next `save`, which writes anew; the third in a row, and one at
    `finish`, is raised. Leaving the block waits.

    origin: the run that writes; check: raises where the folder is not the run's any more; written:
    called with the step of each checkpoint that is complete on disk.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        origin: Mapping[str, Any] = {},
        check: Callable[[], None] = nothing,
        written: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder, self.method, self.origin = folder, method, origin
        self.check, self.written = check, written
        self.pool = ThreadPoolExecutor(1)
        self.job: Future[float] | None = None
        self.failures = 0
        self.grace = grace()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def save(self, state: State, spare: Spare = none) -> list[str]:
        """Begin to write `state`; returns warnings about the write before.

        Afterwards all but the newest two checkpoints, and those that `spare` keeps, are deleted.
        OSError where the third write in a row has failed.
        """
        notes, began = [], time.monotonic()
        try:
            notes += self._too_slow(self.finish())
            self.failures = 0
        except OSError as error:
            self.failures += 1
            if self.failures == RETRIES:
                raise
            notes = [f"the last checkpoint could not be written ({error}); trying again now"]
        parts, facts = _snapshot(state, self.method)
        facts["origin"] = dict(self.origin)
        if distributed.rank() == 0:
            copied = time.monotonic() - began
            job = (self.folder, parts, facts, 2, spare, self.check)
            self.job = self.pool.submit(self._timed, copied, *job)
        return notes

    def finish(self) -> float:
        """Wait for the last write; returns the seconds it took, or raises its error."""
        job, self.job = self.job, None
        return 0.0 if job is None else job.result()

    def _timed(self, before: float, *args: Any) -> float:
        """Write; returns the seconds that took, plus `before`."""
        began = time.monotonic()
        self.written(step_of(_write(*args)))
        return before + time.monotonic() - began

    def _too_slow(self, seconds: float) -> list[str]:
        """A warning, once, if a launcher may not wait for the last checkpoint."""
        if 1.5 * seconds <= self.grace:
            return []
        grace, self.grace = self.grace, math.inf
        return [
            f"a checkpoint took {seconds:.0f} s, and torchrun kills {grace:.0f} s after SIGTERM; "
            f"give it --shutdown-timeout {2 * seconds + 1:.0f}, or set "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT for both it and this to know"
        ]


def grace() -> float:
    """Seconds between torchrun's SIGTERM and SIGKILL, by its environment variable or its default.

    Infinity without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of the checkpoint in `path`, from the name."""
    return int(path.name.removeprefix("step-"))


def delete_after(folder: Path, step: int) -> None:
    """Delete all checkpoints that are newer than `step`."""
    _delete(reversed([path for path in find_checkpoints(folder) if step_of(path) > step]))


def resume_newest(
    folder: Path,
    state: State,
    method: Method,
    optim: Mapping[str, Optim],
    origin: Mapping[str, Any] = {},
) -> tuple[Path | None, list[str]]:
    """Load the newest sound checkpoint of `folder` into `state`.

    Args:
        folder: the checkpoints of a run.
        state: the state to fill, in place.
        method: the method of the run.
        optim: the optimisers by net.
        origin: the run that must have written it (see `fewstep.storage.files.of_run`).

    Returns: the path of the checkpoint, None where there are none at all, and notes on damaged
    ones, which are renamed to *.damaged.

    Raises `Damaged` where there are checkpoints and none is sound: a run never starts over
    silently.
    """
    notes: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        try:
            load_checkpoint(path, state, method, optim, origin)
        except Damaged as error:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            notes.append(f"{error}; set aside as {aside.name}")
            continue
        return path, notes
    if any(folder.glob("step-*.damaged")):
        why = "; ".join(notes) or "all were set aside as damaged"
        raise Damaged(
            f"no checkpoint in {folder} is sound ({why}); "
            "choose another --out folder to start anew"
        )
    return None, notes


def load_checkpoint(
    path: Path,
    state: State,
    method: Method,
    optim: Mapping[str, Optim],
    origin: Mapping[str, Any] = {},
) -> None:
    """Check `path` by digest, and that `origin` wrote it; then load it into `state`."""
    facts = read_folder(path)
    of_run(path, facts, origin)
    if facts.get("method") != repr(method):
        raise ValueError(
            f"{path} was written by {facts.get('method')}, not by {method!r}; resume with the "
            "same settings or choose another --out folder"
        )
    load_weights(state.nets, unpack(path / "nets.safetensors"), path)
    load_weights(state.average, unpack(path / "average.safetensors"), path)
    for name in (n[6:-12] for n in facts["sha256"] if n.startswith("optim-")):
        optimizer = optim[name].build(state.nets[name].parameters())
        _unflatten(optimizer, unpack(path / f"optim-{name}.safetensors"))
        state.optimizers[name] = optimizer
    for key in COUNTERS:
        setattr(state, key, int(facts[key]))
    state.scales = {net: Scale(*scale) for net, scale in facts.get("scales", {}).items()}
    began = facts.get("restarts", {})
    state.restarts = {net: (int(step), int(images)) for net, (step, images) in began.items()}
    state.memory = {name: list(map(float, old)) for name, old in facts.get("memory", {}).items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts as "<parameter index>.<name>", in order of names.

    After loading, the optimiser has them in another order in every process.
    """
    tensors = {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return dict(sorted(tensors.items()))


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        like = parameters[int(index)] if value.ndim else value  # a count of steps is no moment
        states.setdefault(int(index), {})[key] = distributed.scatter(value, like)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
