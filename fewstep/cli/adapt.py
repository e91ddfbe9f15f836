"""fewstep adapt: carry a fine-tune of a model over to a student that was distilled from it.

Score distillation from where the student is: the teacher is the fine-tuned model, the student
starts as the distilled one, and the fake score starts as the model *before* its fine-tune, which
is the score of what the student makes. So the first direction is already the difference between
fine-tune and base. With a fake score that starts as the new teacher it would be zero; a plain
denoising loss on the student would lose its few steps. See docs/adapt.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.cli.parser import code_flag, fail, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.cli.recipe_run import machine_flags, perform, rehearse, told
from fewstep.runs.command_line import command_line
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import describe_model, teacher_of
from fewstep.storage.user_code import decoded, trust
from fewstep.teachers.diffusers.folder import is_pipeline
from fewstep.teachers.diffusers.single_file import located

STEPS = 300


def run(args: list[str]) -> int:
    """Adapt a student; returns the exit code."""
    from fewstep.cli.run_flags import help_text, resolve
    from fewstep.recipes.registry import every, recipe
    from fewstep.recipes.text_to_image import suit

    parser = verb_parser(
        "adapt",
        "Carry a fine-tune over to a few-step student without losing its few steps. The student "
        "is a run folder (its base and its settings are then known), or with --recipe any model "
        "or pipeline folder. Fields of the run may follow, such as --steps, --lora or --prompts.",
        add_help=False,
    )
    parser.add_argument("student", nargs="?", help="the distilled model: a run or pipeline folder")
    parser.add_argument(
        "--base", default="", help="what it was distilled from (default: what its run names)"
    )
    tune = parser.add_mutually_exclusive_group()
    tune.add_argument("--tuned", default="", help="the fine-tuned base: a folder or snapshot")
    tune.add_argument(
        "--tune", type=Path, help="a LoRA of the base (.safetensors), which is fused into a folder"
    )
    parser.add_argument("--tune-scale", type=float, default=1.0, help="of --tune (default: 1)")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/adapted)")
    parser.add_argument("--recipe", default="", help="for a student that is no run folder")
    code_flag(parser)
    machine_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the run and its cost only")
    parser.add_argument("-h", "--help", action="store_true", help="this, and the run's fields")
    flags, rest = parser.parse_known_args(args)
    if flags.student is None:
        if not flags.help:
            fail("adapt needs a student, such as runs/sid; fewstep adapt --help tells more")
        print(parser.format_help())
        return 0
    student = located(flags.student, say)
    trust(flags.code, [student])
    made = recipe(flags.recipe)() if flags.recipe else _run_of(student)
    name = flags.recipe or str(RunFolder(Path(student)).facts().get("recipe"))
    if flags.help:
        print(parser.format_help())
        print(help_text(made, f"fewstep adapt {flags.student}"))
        return 0
    base = located(flags.base, say) if flags.base else _base_of(student)
    out = flags.out or Path("runs/adapted")
    found = resolve(_started(made, student), rest, "fewstep adapt", parser.flags())
    suit(found, name, every())
    _refuse(found)
    if not (flags.tuned or flags.tune):
        fail("adapt needs the fine-tune: --tuned FOLDER, or --tune LORA.safetensors")
    tuned = located(flags.tuned, say) if flags.tuned else _fused(base, flags, out)
    if flags.dry_run:
        return rehearse(found, name, tuned, flags.device, student, base)
    machine: dict[str, Any] = {"device": flags.device, "timeout": flags.timeout}
    machine |= {"parts": flags.shard, "init": student, "fake_init": base, "track": flags.track}
    command = command_line(["fewstep", "adapt", *args])
    return told(out, perform(found, out, name, tuned, command, **machine))


def _run_of(student: str) -> Run:
    """The run that made the student, as its settings are."""
    folder = RunFolder(Path(student))
    if is_pipeline(student) or not (folder.path / "run.json").is_file():
        fail(f"{student} is no run folder: say by which recipe it is adapted, with --recipe t2i")
    folder.refuse_unfinished()
    made: Run = decoded(folder.facts()["run"], Run, folder.path)
    return made


def _base_of(student: str) -> str:
    """What the run of the student was distilled from."""
    if is_pipeline(student) or not (where := teacher_of(RunFolder(Path(student)))):
        fail("adapt needs to know what the student was distilled from: --base FOLDER")
    return where


def _started(run: Run, student: str) -> Run:
    """The run with the student's own network, and as many steps as an adaptation takes.

    Its adapters belonged to the base, so new ones are asked for with --lora alone.
    """
    return replace(run, model=describe_model(student), steps=STEPS, lora=None)


def _refuse(run: Run) -> None:
    """Fail where the method is none that can be continued from a distilled student."""
    name = type(run.method).__name__
    if not run.distils or not hasattr(run.method, "fake"):
        fail(
            f"{name} has no fake score, so it cannot carry a fine-tune over; choose a method that "
            'has one, such as --method "SiD(alpha=1.0)"'
        )
    if run.method.needs_data:
        say(f"note: {name} takes pictures too: they should be those of the fine-tune")


def _fused(base: str, flags: Any, out: Path) -> str:
    """The folder of the base with the LoRA in it, beside the run."""
    if not is_pipeline(base):
        fail(f"{base} is no pipeline folder, so it has no LoRA files; use --tuned FOLDER")
    from fewstep.teachers.diffusers.fused import fuse

    place = out.with_name(f"{out.name}-teacher")
    say(f"the fine-tuned teacher: {place}")
    return str(fuse(Path(base), flags.tune, place, flags.tune_scale))
