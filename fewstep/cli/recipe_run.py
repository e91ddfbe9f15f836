"""What is done with a run of the command line: it is executed with a progress bar, or tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.progress_bar import Bar, Stop, first, say, stopping
from fewstep.config import encode
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import Note, Step, execute, prepare
from fewstep.runs.teacher import describe_model, resolve_run
from fewstep.runs.trackers import Tracking, require_trackers
from fewstep.storage.machine_errors import short_of_memory
from fewstep.training import distributed
from fewstep.training.progress import heard, listen

NO_TEACHER = "what it costs is known with a teacher: pass --teacher too"


def like_teacher(run: Run, teacher: str, size: str = "") -> Run:
    """`run` with the network of its teacher, where there is one that can be read.

    Where it cannot, the run says so when it loads it, after the person's own files are known.
    size: of its pictures, such as "1024x768"; "": the teacher's own.
    """
    if size and not teacher:
        raise ValueError("--size is that of a pipeline's pictures: pass it with --teacher")
    if size:
        return replace(run, model=describe_model(teacher, size))
    if not (teacher and run.distils):
        return run
    try:
        return replace(run, model=describe_model(teacher))
    except (ValueError, OSError):
        return run


def perform(
    run: Run,
    out: Path,
    recipe: str,
    teacher: str,
    command: str,
    device: str = "cpu",
    init: str = "",
    fake_init: str = "",
    timeout: float = distributed.TIMEOUT,
    parts: int = 1,
    track: Sequence[str] = (),
) -> int:
    """Execute `run` in `out` with a progress bar; the exit code."""
    require_trackers(track)
    facts = {"recipe": recipe, "teacher": teacher, "command": command, "init": init}
    facts["fake_init"] = fake_init
    bar = Bar(recipe, run.last_step)
    try:
        with (
            stopping(distributed.under_torchrun()) as stop,
            distributed.process_group(device, timeout) as here,
            closing(execute(run, out, device=here, parts=parts, **facts)) as work,
            bar,
            listen(partial(_preparing, stop, bar)),
            heard(bar.say),
            tracked(out, track, bar.say) as follow,
        ):
            for progress in work:
                if isinstance(progress, Note):
                    bar.say(progress.text)
                if isinstance(progress, Step):
                    skipped = progress.logs["skipped"]
                    bar.update(progress.step, f"skipped {skipped:.0f}" if skipped else "")
                    follow()
                    asked = distributed.max_over_ranks(
                        stop.signal
                    )  # all stop at one step, or none
                    if asked and progress.step < progress.steps:
                        work.close()
                        distributed.max_over_ranks(0)  # none leaves before rank 0 has saved
                        at = f"{progress.step} of {progress.steps}"
                        where = f"{out}; continue with: {command}"
                        bar.say(f"stopped at step {at}, saved in {where}")
                        return stop.code(asked)
            follow()  # what a finished run did before it was tracked
    except (RuntimeError, MemoryError) as error:
        if not (text := _failure(error)):
            raise
        print(f"fewstep: {text}", file=sys.stderr)
        return 1
    say(f"finished: {out}")
    return 0


def told(out: Path, code: int) -> int:
    """Print where a run is and whether it is finished, where that is asked for; returns `code`."""
    if first():
        folder = RunFolder(out)
        model = str(folder.student) if folder.finished else None
        result({"run": str(out), "finished": folder.finished, "model": model})
    return code


@contextmanager
def tracked(
    folder: Path, names: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Within the block, a function that brings the trackers of a run folder up to date."""
    tracking = Tracking(folder, names if first() else ())

    def follow() -> None:
        for text in tracking.follow():
            tell(text)

    try:
        yield follow
    finally:
        for text in tracking.close():
            tell(text)


def rehearse(
    run: Run, recipe: str, teacher: str, device: str, init: str, fake_init: str = ""
) -> int:
    """Say what a run would be, and what it would cost."""
    from fewstep.cli.dry_run import estimate, shortened, tried

    cost = NO_TEACHER
    if teacher or not run.distils or run.domain.exact() is not None:
        with heard(say):
            trial = tried(resolve_run(run, teacher, init))
            cost = estimate(prepare(trial, recipe, teacher, device, init, fake_init))
    described = encode(run)
    text = json.dumps(shortened(described), indent=2)
    result({"run": described, "cost": cost}, f"{text}\n{cost}")
    return 0


def _failure(error: Exception) -> str:
    """A sentence for what is wrong with the machine and not with the program; else nothing."""
    if isinstance(error, distributed.ProcessLost):
        return str(error)
    if short_of_memory(error):
        return (
            "the memory does not suffice; compute each batch in more parts with --accumulate, or "
            "lower --batch; what was saved is kept"
        )
    return ""


def _preparing(stop: Stop, bar: Bar, what: str, done: int, total: int) -> None:
    """Show a preparation, and end it where that was asked for."""
    if stop.signal:
        bar.say("stopped before the first step; the same command continues")
        raise SystemExit(stop.code(stop.signal))
    if done < total:
        bar.beside(what, done, total)
