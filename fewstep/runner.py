"""Execute a `Run` in a folder: train, look, save, continue, finish.

`execute` is a generator like `train` beneath it: the caller shows progress in its own loop. Run
the same command again to continue an interrupted run; the same folder never mixes two runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator as Steps
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep import checkpoint
from fewstep.core import Denoiser, Source
from fewstep.draws import Draws
from fewstep.environment import environment
from fewstep.eval.evaluate import Yardstick, score
from fewstep.files import write
from fewstep.gauges import by_level, diversity
from fewstep.generator import Generator
from fewstep.optim import Optim
from fewstep.recipes.run import Domain, Run
from fewstep.report.grid import grid, png
from fewstep.run_folder import RunFolder, locked
from fewstep.spec import encode, own_files
from fewstep.student import load_student, save_student
from fewstep.training import Record, State, train

LOOK, SCORED = 500, 1000
"""Pictures the gauges, and the quick distances, are computed on."""


class Progress:
    """What the caller is told while a run executes: notes in words, then a record a step."""


@dataclass(frozen=True)
class Note(Progress):
    """Something the user should know."""

    text: str


@dataclass(frozen=True)
class Step(Progress):
    """One training step."""

    step: int
    steps: int
    images: int
    logs: dict[str, float]


def load_teacher(domain: Domain, path: str) -> Generator | None:
    """The teacher of a distillation: the model in `path`, or the domain's exact one."""
    return load_student(path) if path else domain.exact()


@dataclass(frozen=True, eq=False)
class Work:
    """What a run is made of: everything but its folder and its state."""

    run: Run
    teacher: Generator | None
    net: nn.Module
    """What training starts from: the teacher's network, or a fresh one."""
    source: Source

    @property
    def denoiser(self) -> Denoiser | None:
        """The teacher's."""
        return None if self.teacher is None else self.teacher.denoiser

    def init(self) -> State:
        """The state at step 0."""
        return State.init(self.run.method, self.denoiser, self.net)

    def records(self, state: State) -> Iterator[Record]:
        """Train from `state` on."""
        run = self.run
        return train(
            run.method,
            self.denoiser,
            self.net,
            self.source,
            batch=run.batch,
            steps=run.steps,
            optim=run.optim,
            accumulate=run.accumulate,
            ema=run.ema,
            seed=run.seed,
            patience=run.patience,
            state=state,
        )


def starting_point(run: Run, init: str) -> nn.Module:
    """The network in the folder `init`, which must be what `run.model` describes."""
    found = load_student(init)
    if found.model != run.model:
        raise ValueError(f"{init} holds {found.model}, but the run's network is {run.model}")
    net: nn.Module = found.denoiser
    return net


def usable(device: str) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", "mps"), if this machine has it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"this machine has no device {device!r}; leave --device out for the CPU"
        ) from None
    return found


def prepare(run: Run, recipe: str, teacher: str, device: str = "cpu", init: str = "") -> Work:
    """Load and build what `run` needs; a ValueError says what is missing or does not fit."""
    where = usable(device)
    model = load_teacher(run.domain, teacher) if run.distils else None
    if run.distils and model is None:
        raise ValueError(
            f"{recipe} needs a teacher: train one first (see 'fewstep recipes'), then pass its "
            "run folder with --teacher"
        )
    if model is not None and model.model is not None and model.model != run.model:
        raise ValueError(
            "the student has the teacher's network, but --model says otherwise: "
            f"{run.model} is not {model.model}"
        )
    source = run.domain.source(run.model, data_free=not run.method.needs_data)
    if init:
        net = starting_point(run, init)
    elif model is not None and model.model is not None:
        net = model.denoiser
    else:
        net = run.model.build(run.seed)
    if model is not None:
        model.denoiser.to(where)
    return Work(run, model, net.to(where), source)


def execute(
    run: Run,
    out: Path,
    *,
    recipe: str,
    teacher: str = "",
    command: str = "",
    device: str = "cpu",
    init: str = "",
) -> Steps[Progress, None, None]:
    """Train `run` in the folder `out`; yields notes and steps. Closing it saves and stops."""
    folder = RunFolder(out)
    facts = {
        "format": 1,
        "recipe": recipe,
        "run": encode(run),
        "distils": run.distils,
        "teacher": str(Path(teacher).resolve()) if teacher else "",
        "init": str(Path(init).resolve()) if init else "",
        "files": own_files(run),
        "command": command,
        "environment": environment(),
    }
    if folder.continues(facts) and folder.finished:
        yield Note(f"{out} is finished already")
        return
    work = prepare(run, recipe, teacher, device, init)
    with locked(out):
        yield from _train(work, folder, folder.open(facts))


def _train(work: Work, folder: RunFolder, continues: bool) -> Iterator[Progress]:
    run, state = work.run, work.init()
    if continues:
        optim: dict[str, Optim] = dict.fromkeys(state.nets, run.optim)
        found, notes = checkpoint.resume(folder.checkpoints, state, run.method, optim)
        yield from map(Note, notes)
        if found is not None:
            yield Note(f"continuing from step {state.step} of {run.steps}")
    for name in ("log.jsonl", "gauges.jsonl"):
        folder.rewind(name, state.step or -1)  # step 0 is looked at again
    watch = Watch(run, folder, work.denoiser)
    if state.step == 0:
        watch.look(state)
    saved = state.step
    try:
        for record in work.records(state):
            watch.log(record)
            last = record.step == run.steps
            if record.step % run.draw_every == 0 or last:
                watch.look(state)
            if record.step % run.save_every == 0 or last:
                checkpoint.save(folder.checkpoints, state, run.method)
                saved = record.step
            yield Step(record.step, run.steps, record.images, record.logs)
    except GeneratorExit:
        if state.step > saved:
            checkpoint.save(folder.checkpoints, state, run.method)
        raise
    card = {"images": state.images, "steps": state.step, "seed": run.seed}
    save_student(folder.student, state.average, run.model, run.method, card)


@dataclass
class Watch:
    """Writes the log, the gauges and the pictures of a run."""

    run: Run
    folder: RunFolder
    teacher: Denoiser | None
    yardstick: Yardstick | None = None

    def __post_init__(self) -> None:
        self.yardstick = self.run.domain.yardstick()
        self.every = max(1, self.run.steps // 500)
        spent = [line.get("seconds", 0.0) for line in self.folder.lines("log.jsonl")]
        self.began = time.perf_counter() - (spent[-1] if spent else 0.0)
        self.skipped = 0

    def log(self, record: Record) -> None:
        """One line of log.jsonl, about 500 in a run, and every skipped update."""
        skipped, self.skipped = record.state.skipped > self.skipped, record.state.skipped
        if record.step % self.every == 0 or record.step == self.run.steps or skipped:
            seconds = time.perf_counter() - self.began
            line = {"step": record.step, "images": record.images, "seconds": round(seconds, 2)}
            finite = {k: v if math.isfinite(v) else str(v) for k, v in record.logs.items()}
            self.folder.append("log.jsonl", {**line, **finite})

    @torch.no_grad()
    def look(self, state: State) -> None:
        """Pictures of the same noise, the gauges, and quick distances on few samples."""
        run = self.run
        generator = Generator(
            state.average, run.method.sampler, run.model.shape, run.model.classes
        )
        cheap = generator.sampler.calls <= 4
        x = generator.sample(range(SCORED if cheap else 80))
        name = f"step-{state.step:08d}.png"
        write(self.folder.grids / name, png(grid(x[:80].cpu(), columns=10)))
        if not cheap:
            return
        every = torch.arange(len(x), device=x.device)
        labels = every % run.model.classes if run.model.classes else None
        line: dict[str, Any] = {"step": state.step, "images": state.images}
        line["diversity"] = diversity(x[:LOOK], None if labels is None else labels[:LOOK])
        line["levels"] = self._levels(state, x[:LOOK], None if labels is None else labels[:LOOK])
        if self.yardstick is not None:
            line["quick"] = {
                "samples": len(x),
                **score(x.cpu(), None if labels is None else labels.cpu(), self.yardstick),
            }
        self.folder.append("gauges.jsonl", line)

    def _levels(self, state: State, x: Tensor, labels: Tensor | None) -> list[dict[str, float]]:
        times = getattr(self.run.method, "times", None)
        if self.teacher is None or times is None:
            return []
        fake: Any = dict(state.nets.items()).get("fake")
        return by_level(
            x, labels, self.teacher, fake, times, Draws.range(0, len(x), device=x.device)
        )
