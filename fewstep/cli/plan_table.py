"""What each way of distilling a teacher takes: the table of fewstep plan, and its command line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fewstep.cli.parser import fail
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


def plan(flags: Namespace, rest: list[str], others: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The plan that the flags of `fewstep plan` ask for, as data and as text.

    rest: the flags of the recipe; others: those of the verb, for a misspelling.
    """
    gpus = GPUs.parse(flags.gpus)
    where = located(flags.teacher, say)
    trust(flags.code, [where])
    model = describe_model(where, flags.size)
    for note in notes_on(where):
        say(note)
    name = flags.recipe or recipe_for(model)
    prog = f"fewstep plan {flags.teacher}"
    planned = resolve(like_teacher(recipe(name)(), where, flags.size), rest, prog, others)
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
    return value, "\n".join(lines)


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
