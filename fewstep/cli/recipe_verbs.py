"""fewstep train and fewstep distill: their flags, and the run that these make of a recipe."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from pathlib import Path
from typing import Literal

from fewstep.cli.parser import SIZE, Parser, code_flag, fail, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.runs.command_line import command_line
from fewstep.runs.trackers import TRACKERS
from fewstep.storage.user_code import trust


def run_recipe(verb: Literal["train", "distill"], args: list[str]) -> int:
    """Read the flags of a recipe, and execute it; the exit code."""
    parser = _recipe_parser(verb)
    flags, rest = parser.parse_known_args(args)
    if flags.recipe is None:
        example = "digits" if verb == "distill" else "digits_teacher"
        if not flags.help:
            fail(f"{verb} needs a recipe, such as '{example}'; 'fewstep recipes' lists them")
        print(parser.format_help())
        print(f"fewstep {verb} RECIPE --help lists every field of the recipe.")
        return 0
    refuse_timeout(flags.timeout)
    from fewstep.cli.recipe_run import like_teacher, perform, rehearse, told
    from fewstep.cli.run_flags import help_text, resolve
    from fewstep.recipes.registry import every, recipe
    from fewstep.recipes.text_to_image import suit
    from fewstep.teachers.diffusers.single_file import located

    name = flags.recipe
    run = recipe(name)()
    if flags.help:
        run = resolve(run, rest, f"fewstep {verb} {name}", parser.flags())
        print(parser.format_help())
        print(
            f"{help_text(run, f'fewstep {verb} {name}')}\n"
            'A whole part is replaced by an expression: --method "SIM()", '
            '--method my_file.py:MyMethod, --fake-optim "Optim(lr=1e-5)".'
        )
        return 0
    teacher, init = located(getattr(flags, "teacher", ""), say), located(flags.init, say)
    fake = getattr(flags, "fake_init", "")
    trust(getattr(flags, "code", []), (teacher, init, fake))
    size = getattr(flags, "size", "")
    run = resolve(like_teacher(run, teacher, size), rest, f"fewstep {verb} {name}", parser.flags())
    suit(run, name, every())
    right = "distill" if run.distils else "train"
    if verb != right:
        does = "distils" if run.distils else "trains"
        fail(f"{name} {does} a teacher; the command is: fewstep {right} {name}")
    out = Path(flags.out.replace("{recipe}", Path(name.partition(":")[0]).stem))
    command = command_line(["fewstep", verb, *args])
    if flags.dry_run:
        return rehearse(run, name, teacher, flags.device, init, fake)
    machine = {"device": flags.device, "timeout": flags.timeout, "parts": flags.shard}
    machine |= {"init": init, "fake_init": fake, "track": flags.track}
    return told(out, perform(run, out, name, teacher, command, **machine))


def _recipe_parser(verb: str) -> Parser:
    """The flags that are no fields of a run."""
    parser = verb_parser(
        verb, f"{verb} RECIPE in a folder; the same command continues.", add_help=False
    )
    parser.add_argument("recipe", nargs="?", help="see 'fewstep recipes'; or file.py:function")
    parser.add_argument(
        "--out", default="runs/{recipe}", help="the run folder (default: %(default)s)"
    )
    if verb == "distill":
        parser.add_argument(
            "--teacher",
            default="",
            help="a run or model folder, a pipeline folder or hub:ORG/NAME, or a snapshot",
        )
        parser.add_argument(
            "--fake-init",
            default="",
            help="folder of the network that the fake score starts from (default: the teacher)",
        )
        parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
        code_flag(parser)
    start = "the teacher" if verb == "distill" else "new weights"
    parser.add_argument(
        "--init", default="", help=f"folder of the network to start from (default: {start})"
    )
    machine_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the run and its cost only")
    parser.add_argument("-h", "--help", action="store_true", help="this, and the recipe's fields")
    return parser


def refuse_timeout(seconds: float) -> None:
    """Fail where no step could end in such a time, or none would ever be missed."""
    if not 0 < seconds < math.inf:
        fail(f"--timeout is a positive number of seconds, got {seconds:g}")


def machine_flags(parser: ArgumentParser) -> None:
    """What is no part of a run: where it is computed, and where it is told."""
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="with several processes: seconds a step may take before all stop (default: 120)",
    )
    parser.add_argument(
        "--shard",
        nargs="?",
        type=int,
        const=0,
        default=1,
        metavar="PARTS",
        help="with several processes: each keeps but a part of every net (FSDP2); with a number, "
        "so many share a copy (HSDP)",
    )
    parser.add_argument(
        "--track",
        action="append",
        choices=tuple(TRACKERS),
        default=[],
        help="write the log and the pictures to a tracker too; may be given several times",
    )
