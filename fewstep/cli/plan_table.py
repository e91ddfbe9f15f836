"""What each way of distilling a teacher takes: the table of fewstep plan, and its command line."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fewstep.cli.parser import fail
from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.recipe_run import like_teacher
from fewstep.cli.run_flags import resolve
from fewstep.diffusion.model import Model
from fewstep.plan.choices import (
    RESERVE,
    Choice,
    GiB,
    GPUs,
    Row,
    best,
    choices,
    command,
    recipe_for,
    rows,
)
from fewstep.plan.links import Links
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
    links = _links(flags, gpus)
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
    machines = (gpus, flags.tflops * 1e12, model, links)
    table_rows, refused = _rehearsed(planned, flags.at_once, *machines)
    row = best(table_rows)
    own = [*rest, "--size", flags.size] if flags.size else rest
    told = (planned, name, flags.teacher, gpus, own, links.per_node)
    line = None if row is None else command(row, *told)
    lines = [_head(planned, name, gpus), _table(table_rows, planned, gpus)]
    lines += [f"not possible: {reason}" for reason in refused]
    lines += [_end(line, None if row is None else limits(row, planned, gpus, links))]
    value: dict[str, Any] = {
        "recipe": name,
        "method": repr(planned.method),
        "batch": planned.batch,
    }
    value |= {"steps": planned.steps, "gpus": asdict(gpus), "links": asdict(links)}
    value |= {"refused": refused, "command": line}
    value["rows"] = [asdict(row) for row in sorted(table_rows, key=lambda row: row.memory)]
    return value, "\n".join(lines)


def _links(flags: Namespace, gpus: GPUs) -> Links:
    """What connects the GPUs, which make whole nodes."""
    rates = {name: getattr(flags, name) for name in ("within", "between", "disk", "hop")}
    for name, rate in {"per-node": flags.per_node, **rates}.items():
        if not 0 < rate < math.inf:
            fail(f"--{name} is a positive number, got {rate:g}")
    if gpus.count > flags.per_node and gpus.count % flags.per_node:
        fail(
            f"{gpus.count} GPUs do not make whole nodes of {flags.per_node}; give another number "
            "of --gpus, or --per-node"
        )
    each = {name: rates[name] * 1e9 for name in ("within", "between", "disk")}
    return Links(flags.per_node, hop=flags.hop * 1e-6, **each)


def _rehearsed(
    run: Run, at_once: list[int], gpus: GPUs, rate: float, teacher: Model, links: Links
) -> tuple[list[Row], list[str]]:
    """All rows, and the reasons why some choices have none."""
    measured: list[Row] = []
    refused: dict[str, None] = {}
    chosen = choices(teacher, at_once)
    with Bar("rehearsing", len(chosen)) as bar:
        for done, choice in enumerate(chosen, 1):
            try:
                measured += rows(run, choice, gpus, rate, teacher, links)
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


ONE = ("a step at least", "all steps")
SEVERAL = ("batch", "computing", "sending", "sent a GPU", *ONE)


def _table(found: list[Row], run: Run, gpus: GPUs) -> str:
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
        *(SEVERAL if gpus.count > 1 else ONE),
    )
    lines = [head]
    for row in sorted(found, key=lambda row: row.memory):
        c = row.choice
        sent = (str(row.batch), span(row.computing), span(row.sending), memory(row.sent))
        lines.append(
            (
                "adapters" if c.lora else "all weights",
                "yes" if c.recompute else "no",
                c.precision,
                c.frozen,
                f"{c.bits} bits",
                nets(c, gpus),
                str(c.batch),
                memory(row.memory),
                fitting(row),
                *(sent if gpus.count > 1 else ()),
                span(row.seconds),
                span(row.seconds * run.steps),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def nets(choice: Choice, gpus: GPUs) -> str:
    """How the GPUs hold the nets, in words."""
    if choice.parts == 1:
        return "whole"
    return "in parts" if choice.parts == gpus.count else f"in {choice.parts} parts"


def fitting(row: Row) -> str:
    """Whether a row fits, and what does not, in words."""
    if row.fits:
        return "fits"
    made_whole = row.choice.parts > 1 and row.memory == row.start
    return "does not fit at the start" if made_whole else "does not fit"


def limits(row: Row, run: Run, gpus: GPUs, links: Links) -> str:
    """What takes the time of a step, in two sentences."""
    whole, several = row.seconds + row.saving, gpus.count > 1
    words = [f"{row.computing / whole:.0%} computing"]
    if several:
        words.append(f"{row.sending / whole:.0%} sending")
        if row.hops > row.sending / 2:
            words[-1] += " (most of it waiting for short messages: fewer parts help, not links)"
    words.append(f"{row.reading / whole:.0%} reading samples")
    words.append(f"{row.saving / whole:.0%} checkpoints")
    also = ", the first two at once" if row.choice.parts > 1 else ""
    writing = span(row.checkpoint / links.disk)
    return (
        f"Of a step's time {', '.join(words)}{also}. A checkpoint every {run.save_every} steps is "
        f"{memory(row.checkpoint)}: process 0 needs twice as much main memory beside its own, and "
        f"writes for {writing} at {links.disk / 1e9:g} GB/s."
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


def _end(command: str | None, limits: str | None) -> str:
    lines = (
        f"\nIt fits where {RESERVE / GiB:g} GiB and 5 % are left for the driver and the allocator."
    )
    lines += f"\n{limits}" if limits else ""
    if command is None:
        return (
            f"{lines}\nNothing fits: compute fewer samples at once (--at-once 1), take more GPUs, "
            "or try --offload, which keeps the teacher in main memory and is not planned here."
        )
    return f"{lines}\n\n{command}"


def _digits(value: float) -> str:
    """Two digits that say something, and no exponent: "0.051", "3.2", "370"."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
