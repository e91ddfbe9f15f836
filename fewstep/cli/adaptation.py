"""The run of an adaptation: from that of its student, its base, and a LoRA of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.cli.parser import fail
from fewstep.cli.progress_bar import say
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import describe_model, teacher_of
from fewstep.storage.user_code import decoded
from fewstep.teachers.diffusers.folder import is_pipeline
from fewstep.teachers.diffusers.fused import fuse

STEPS = 300


def run_of(student: str) -> Run:
    """The run that made the student, as its settings are."""
    folder = RunFolder(Path(student))
    if is_pipeline(student) or not (folder.path / "run.json").is_file():
        fail(f"{student} is no run folder: say by which recipe it is adapted, with --recipe t2i")
    folder.refuse_unfinished()
    made: Run = decoded(folder.facts()["run"], Run, folder.path)
    return made


def base_of(student: str) -> str:
    """What the run of the student was distilled from."""
    if is_pipeline(student) or not (where := teacher_of(RunFolder(Path(student)))):
        fail("adapt needs to know what the student was distilled from: --base FOLDER")
    return where


def started(run: Run, student: str) -> Run:
    """The run with the student's own network, and as many steps as an adaptation takes.

    Its adapters belonged to the base, so new ones are asked for with --lora alone.
    """
    return replace(run, model=describe_model(student), steps=STEPS, lora=None)


def refuse(run: Run) -> None:
    """Fail where the method is none that can be continued from a distilled student."""
    name = type(run.method).__name__
    if not run.distils or not hasattr(run.method, "fake"):
        fail(
            f"{name} has no fake score, so it cannot carry a fine-tune over; choose a method that "
            'has one, such as --method "SiD(alpha=1.0)"'
        )
    if run.method.needs_data:
        say(f"note: {name} takes pictures too: they should be those of the fine-tune")


def fused(base: str, flags: Any, out: Path) -> str:
    """The folder of the base with the LoRA in it, beside the run."""
    if not is_pipeline(base):
        fail(f"{base} is no pipeline folder, so it has no LoRA files; use --tuned FOLDER")
    place = out.with_name(f"{out.name}-teacher")
    say(f"the fine-tuned teacher: {place}")
    scale = 1.0 if flags.tune_scale is None else flags.tune_scale
    return str(fuse(Path(base), flags.tune, place, scale))
