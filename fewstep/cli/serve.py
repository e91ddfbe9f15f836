"""fewstep serve: a playground in the browser, for a student and its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.parser import VAE_OR_NONE, code_flag, fail, refuse_missing, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.cli.web_server import require_server, serve_page, server_flags
from fewstep.storage.user_code import trust

if TYPE_CHECKING:
    from fewstep.diffusion.generator import Generator
    from fewstep.web.making import Side


def run(args: list[str]) -> int:
    """Serve the playground until it is stopped."""
    parser = verb_parser(
        "serve",
        "Try a student in a browser: its pictures beside its teacher's, step by step, from the "
        "same noise; walks between seeds, variations, grids. Only this machine can read it.",
    )
    parser.add_argument("student", type=Path, help="what `fewstep sample` takes, such as a run")
    parser.add_argument(
        "--teacher", default="", help="what it is compared with (default: the run's own teacher)"
    )
    parser.add_argument("--no-teacher", action="store_true", help="show the student alone")
    server_flags(parser)
    parser.add_argument("--vae", default="", help=VAE_OR_NONE)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    if flags.teacher and flags.no_teacher:
        fail("--teacher and --no-teacher contradict each other: leave one of them out")
    require_server("serve", flags.port)
    refuse_missing(flags.student)
    from fewstep.web.playground import Playground, title

    trust(flags.code, [flags.student, *([Path(flags.teacher)] if flags.teacher else [])])
    sides = open_sides(flags.student, flags.teacher, flags.no_teacher, flags.vae, flags.device)
    playground = Playground(sides, title(sides[0].generator))
    return serve_page(playground.application, flags, "it")


def open_sides(student: Path, teacher: str, alone: bool, vae: str, device: str) -> list[Side]:
    """The student and, unless it is to be alone or there is none, its teacher, warmed up.

    ValueError where one cannot be opened, or they make samples of different kinds.
    """
    from fewstep.runs.run_folder import RunFolder
    from fewstep.runs.runner import device_named
    from fewstep.runs.teacher import open_model
    from fewstep.web.making import Side, warm
    from fewstep.web.same_picture import Opened

    RunFolder(student).refuse_unfinished()
    where = device_named(device)
    sides = [Side("student", open_model(student, where, vae), Opened(str(student), vae))]
    if teacher:
        made = open_model(teacher, where, vae)
        sides.append(Side("teacher", made, Opened(teacher, vae)))
    elif not alone:
        sides += _own_teacher(student, where, vae)
    for side in sides:
        refuse_unlike(sides[0].generator, side.generator)
        warm(side)
    return sides


def refuse_unlike(student: Generator, teacher: Generator) -> None:
    """ValueError where a student and a teacher cannot be asked for the same picture."""
    for what, mine, its in (
        ("shape of samples", student.shape, teacher.shape),
        ("number of classes", student.classes, teacher.classes),
        ("use of prompts", student.text is not None, teacher.text is not None),
    ):
        if mine != its:
            raise ValueError(
                f"the teacher's {what} is {its}, the student's {mine}: they cannot be compared; "
                "choose another --teacher, or --no-teacher"
            )


def _own_teacher(student: Path, device: object, vae: str) -> list[Side]:
    """The teacher that a run names, or the exact one of its domain; none, with a word why."""
    from fewstep.domains.domain import Domain
    from fewstep.runs.run_folder import RunFolder
    from fewstep.runs.teacher import open_model, teacher_of
    from fewstep.storage.user_code import decoded
    from fewstep.web.making import Side
    from fewstep.web.same_picture import Opened

    if not (student / "run.json").is_file():
        return []
    folder = RunFolder(student)
    facts = folder.facts()
    if not facts.get("distils"):
        return []
    try:
        path = teacher_of(folder)
        if path:
            opened = open_model(path, str(device), vae)
            return [Side("teacher", opened, Opened(_from_here(path), vae))]
        domain: Domain = decoded(facts["run"].get("domain"), Domain, student)
    except ValueError as error:
        say(f"the teacher is not shown: {error}")
        return []
    exact = domain.exact()
    if exact is None:
        return []
    kind = type(domain)
    imports = f"from {kind.__module__} import {kind.__name__}"
    return [Side("teacher", exact, Opened(expression=f"{domain!r}.exact()", imports=imports))]


def _from_here(path: str) -> str:
    """A path below the present folder without the way to it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
