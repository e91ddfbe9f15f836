"""fewstep demo: teacher, student, measurements and report of the embedded example."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import verb_parser
from fewstep.runs.command_line import command_line
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.files import read_json


def run(args: list[str]) -> int:
    """The main job on the embedded example."""
    parser = verb_parser(
        "demo",
        "Train a teacher on 8x8 digits, distil it to one step with SiD, "
        "measure both, and write a report.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    flags = parser.parse_args(args)
    return demonstrate(flags.out, flags.seed, command_line(["fewstep", "demo", *args]))


def few_threads() -> None:
    """At most two threads, unless the person says otherwise: small networks gain no more."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, torch.get_num_threads()))


def demonstrate(out: Path, seed: int, command: str) -> int:
    """Teacher, student, measurements, report; steps that are done already are not repeated."""
    from fewstep.cli.measure import measured, table
    from fewstep.cli.recipe_run import perform
    from fewstep.recipes.digits import digits, digits_teacher
    from fewstep.report.page import write_report

    RunFolder(out).refuse_foreign()
    few_threads()
    teacher = out / "teacher"
    for run, where, recipe, source in (
        (digits_teacher(), teacher, "digits_teacher", ""),
        (digits(), out, "digits", str(teacher)),
    ):
        code = perform(replace(run, seed=seed), where, recipe, source, command)
        if code:
            return code
    try:
        metrics = {k: v for k, v in read_json(out / "metrics.json").items() if k != "protocol"}
    except ValueError:
        metrics = measured(out, samples=5000, draws=3)
    report = write_report(out)
    made = {"run": str(out), "metrics": metrics, "report": str(report)}
    result(made, f"{table(metrics)}\n\nreport: {report}")
    return 0
