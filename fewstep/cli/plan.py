"""fewstep plan: what each way of distilling a teacher takes, as a table, and a command line."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fewstep.cli.output import result
from fewstep.cli.parser import SIZE, code_flag, fail, verb_parser
from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.recipe_run import like_teacher
from fewstep.cli.run_flags import resolve
from fewstep.diffusion.model import Model
from fewstep.plan.choices import RESERVE, GiB, GPUs, Row, best, choices, command, recipe_for, rows
from fewstep.recipes.registry import every, recipe
from fewstep.recipes.text_to_image import suit
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model, notes_on
from fewstep.storage.user_code import trust
from fewstep.teachers.diffusers.single_file import located

RATE = 80.0
"""Tera-operations a second in bf16 that a GPU is taken to sustain."""


def run(args: list[str]) -> int:
    """Print what each way of distilling a teacher takes; returns the exit code."""
    parser = verb_parser(
        "plan",
        "Tell the memory and time of each way to distil a teacher on given GPUs, before anything "
        "is loaded: a step of the recipe is done on tensors that have no numbers. The recipe's "
        "own flags, such as --method, may follow.",
    )
    parser.add_argument(
        "teacher",
        help="a pipeline folder or hub:ORG/NAME, a finished run or model folder, or a snapshot",
    )
    parser.add_argument("--gpus", required=True, help="how many of which memory, such as 1x24GB")
    parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
    parser.add_argument("--recipe", default="", help="(default: the recipe for such a teacher)")
    parser.add_argument(
        "--at-once",
        type=int,
        nargs="+",
        default=[4],
        metavar="N",
        help="samples that a GPU computes at once (default: 4)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=RATE,
        help=f"10^12 operations a second a GPU sustains in bf16 (default: {RATE:g})",
    )
    code_flag(parser)
    flags, rest = parser.parse_known_args(args)
    gpus = GPUs.parse(flags.gpus)
    if min(flags.at_once) < 1 or not flags.tflops > 0:
        fail("--at-once and --tflops are positive")
    where = located(flags.teacher, say)
    trust(flags.code, [where])
    model = describe_model(where, flags.size)
    for note in notes_on(where):
        say(note)
    name = flags.recipe or recipe_for(model)
    prog = f"fewstep plan {flags.teacher}"
    planned = resolve(like_teacher(recipe(name)(), where, flags.size), rest, prog, parser.flags())
    if not planned.distils:
        fail(f"{name} trains a teacher; plan is for recipes that distil one")
    planned = replace(planned, steps=planned.last_step)
    suit(planned, name, every())
    table_rows, refused = _rehearsed(planned, flags.at_once, gpus, flags.tflops * 1e12, model)
    row = best(table_rows)
    own = [*rest, "--size", flags.size] if flags.size else rest
    line = None if row is None else command(row, planned, name, flags.teacher, gpus, own)
    impossible = [f"not possible: {reason}" for reason in refused]
    lines = [_head(planned, name, gpus), _table(table_rows, planned), *impossible, _end(line)]
    value: dict[str, Any] = {
        "recipe": name,
        "method": repr(planned.method),
        "batch": planned.batch,
    }
    value |= {"steps": planned.steps, "gpus": asdict(gpus), "refused": refused, "command": line}
    value["rows"] = [asdict(row) for row in sorted(table_rows, key=lambda row: row.memory)]
    result(value, "\n".join(lines))
    return 0


def _rehearsed(
    run: Run, at_once: list[int], gpus: GPUs, rate: float, teacher: Model
) -> tuple[list[Row], list[str]]:
    """All rows, and the reasons why some choices have none."""
    measured: list[Row] = []
    refused: dict[str, None] = {}
    chosen = choices(teacher, at_once)
    with Bar("rehearsing", len(chosen)) as bar:
        for done, choice in enumerate(chosen, 1):
            try:
                measured += rows(run, choice, gpus, rate, teacher)
            except ValueError as error:
                refused[str(error)] = None
            bar.update(done)
    if not measured:
        fail(next(iter(refused)))
    return measured, list(refused)


def _head(run: Run, name: str, gpus: GPUs) -> str:
    many = f"{gpus.count} GPU{'s' * (gpus.count > 1)} of {gpus.memory / GiB:g} GiB"
    method = type(run.method).__name__
    return f"{name}: {method}, batch {run.batch}, {run.steps:,} steps, on {many}\n"


def _table(found: list[Row], run: Run) -> str:
    head = (
        "trained",
        "recompute",
        "precision",
        "frozen",
        "moments",
        "nets",
        "at once",
        "a GPU",
        "",
        "a step at least",
        "all steps",
    )
    lines = [head]
    for row in sorted(found, key=lambda row: row.memory):
        c = row.choice
        lines.append(
            (
                "adapters" if c.lora else "all weights",
                "yes" if c.recompute else "no",
                c.precision,
                c.frozen,
                f"{c.bits} bits",
                "in parts" if c.sharded else "whole",
                str(c.batch),
                memory(row.memory),
                "fits" if row.fits else "does not fit",
                span(row.seconds),
                span(row.seconds * run.steps),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def memory(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / GiB:.2f} GiB" if size >= GiB else f"{size / 2**20:.1f} MiB"


def span(seconds: float) -> str:
    """A duration as text: "3.2 ms", "41 s", "2.5 h", "11 days"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(1000 * seconds)} ms"


def _end(command: str | None) -> str:
    lines = (
        f"\nIt fits where {RESERVE / GiB:g} GiB and 5 % are left for the driver and the allocator."
    )
    if command is None:
        return (
            f"{lines}\nNothing fits: compute fewer samples at once (--at-once 1), take more GPUs, "
            "or try --offload, which keeps the teacher in main memory and is not planned here."
        )
    return f"{lines}\n\n{command}"


def _digits(value: float) -> str:
    """Two digits that say something, and no exponent: "0.051", "3.2", "370"."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
