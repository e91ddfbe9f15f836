"""fewstep adapt: carry a fine-tune of a model over to a student that was distilled from it.

Score distillation from where the student is: the teacher is the fine-tuned model, the student
starts as the distilled one, and the fake score starts as the model *before* its fine-tune, which
is the score of what the student makes. So the first direction is already the difference between
fine-tune and base. With a fake score that starts as the new teacher it would be zero; a plain
denoising loss on the student would lose its few steps. See docs/adapt.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.cli.parser import Parser, code_flag, fail, require_finite, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.cli.recipe_verbs import machine_flags, refuse_timeout
from fewstep.runs.command_line import command_line
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
    """Adapt a student; returns the exit code."""
    parser = _parser()
    flags, rest = parser.parse_known_args(args)
    if flags.student is None:
        if not flags.help:
            fail("adapt needs a student, such as runs/sid; fewstep adapt --help tells more")
        print(parser.format_help())
        return 0
    refuse_timeout(flags.timeout)
    if flags.tune_scale is not None and flags.tune is None:
        fail("--tune-scale is that of --tune LORA.safetensors: give both, or leave it out")
    require_finite("--tune-scale", 1.0 if flags.tune_scale is None else flags.tune_scale)
    from fewstep.cli.adaptation import base_of, fused, refuse, run_of, started
    from fewstep.cli.recipe_run import perform, rehearse, told
    from fewstep.cli.run_flags import help_text, resolve
    from fewstep.recipes.registry import every, recipe
    from fewstep.recipes.text_to_image import suit
    from fewstep.teachers.diffusers.single_file import located

    student = located(flags.student, say)
    trust(flags.code, [student])
    made = recipe(flags.recipe)() if flags.recipe else run_of(student)
    name = flags.recipe or str(RunFolder(Path(student)).facts().get("recipe"))
    if flags.help:
        print(parser.format_help())
        print(help_text(made, f"fewstep adapt {flags.student}"))
        return 0
    base = located(flags.base, say) if flags.base else base_of(student)
    out = flags.out or Path("runs/adapted")
    found = resolve(started(made, student), rest, "fewstep adapt", parser.flags())
    suit(found, name, every())
    refuse(found)
    if not (flags.tuned or flags.tune):
        fail("adapt needs the fine-tune: --tuned FOLDER, or --tune LORA.safetensors")
    tuned = located(flags.tuned, say) if flags.tuned else fused(base, flags, out)
    if flags.dry_run:
        return rehearse(found, name, tuned, flags.device, student, base)
    machine: dict[str, Any] = {"device": flags.device, "timeout": flags.timeout}
    machine |= {"parts": flags.shard, "init": student, "fake_init": base, "track": flags.track}
    command = command_line(["fewstep", "adapt", *args])
    return told(out, perform(found, out, name, tuned, command, **machine))


def _parser() -> Parser:
    """The flags that are no fields of a run."""
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
    parser.add_argument("--tune-scale", type=float, help="of --tune (default: 1)")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/adapted)")
    parser.add_argument("--recipe", default="", help="for a student that is no run folder")
    code_flag(parser)
    machine_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the run and its cost only")
    parser.add_argument("-h", "--help", action="store_true", help="this, and the run's fields")
    return parser
