"""What the verbs do, with progress for a person: run a recipe, measure a run, the whole demo."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator as Steps
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep import parallel
from fewstep.cli.display import Bar, Stop, say, stopping
from fewstep.eval.evaluate import Yardstick, evaluate, real_scores
from fewstep.files import read_json, write_json
from fewstep.generator import Generator
from fewstep.machine import short_of_memory
from fewstep.own_code import decoded
from fewstep.pipelines.hub import local
from fewstep.preparation import heard, told
from fewstep.recipes.run import Domain, Run
from fewstep.run_folder import RunFolder
from fewstep.runner import Note, Progress, Step, execute, prepare
from fewstep.spec import encode
from fewstep.student import load_student
from fewstep.teaching import load_teacher, model_of, settled, teacher_of

Metrics = dict[str, dict[str, float]]
NO_TEACHER = "what it costs is known with a teacher: pass --teacher too"


def like_teacher(run: Run, teacher: str) -> Run:
    """`run` with the network of its teacher, where there is one that can be read.

    Where it cannot, the run says so when it loads it, after the person's own files are known.
    """
    if not (teacher and run.distils):
        return run
    try:
        return replace(run, model=model_of(teacher))
    except (ValueError, OSError):
        return run


def perform(
    run: Run,
    out: Path,
    recipe: str,
    teacher: str,
    command: str,
    dry: bool = False,
    device: str = "cpu",
    init: str = "",
    timeout: float = parallel.TIMEOUT,
    parts: int = 1,
) -> int:
    """Execute `run` in `out` with a progress bar, or (`dry`) only say what it would be."""
    if dry:
        from fewstep.cli.cost import estimate, shortened, tried

        known = teacher or not run.distils or run.domain.exact() is not None
        cost = NO_TEACHER
        if known:
            with heard(say):
                trial = tried(settled(run, teacher))
                cost = estimate(prepare(trial, recipe, teacher, device, init))
        print(json.dumps(shortened(encode(run)), indent=2))
        print(cost)
        return 0
    try:
        with (
            stopping(parallel.launched()) as stop,
            parallel.joined(device, timeout) as here,
        ):
            facts = {"recipe": recipe, "teacher": teacher, "command": command, "init": init}
            work = execute(run, out, device=here, parts=parts, **facts)
            bar, where = Bar(recipe, run.steps), f"{out}; continue with: {command}"
            if asked := _follow(work, stop, bar, where):
                return stop.code(asked)
    except (RuntimeError, MemoryError) as error:
        if not (text := _failure(error)):
            raise
        print(f"fewstep: {text}", file=sys.stderr)
        return 1
    say(f"finished: {out}")
    return 0


def _failure(error: Exception) -> str:
    """A sentence for what is wrong with the machine and not with the program; else nothing."""
    if isinstance(error, parallel.Lost):
        return str(error)
    if short_of_memory(error):
        return (
            "the memory does not suffice; compute each batch in more parts with --accumulate, or "
            "lower --batch; what was saved is kept"
        )
    return ""


def _follow(work: Steps[Progress, None, None], stop: Stop, bar: Bar, where: str) -> int:
    """Show `work` until it ends, or is stopped and saved: then the number of the signal."""
    with closing(work), bar, told(partial(_preparing, stop, bar)), heard(bar.say):
        for progress in work:
            if isinstance(progress, Note):
                bar.say(progress.text)
            if isinstance(progress, Step):
                skipped = progress.logs["skipped"]
                bar.update(progress.step, f"skipped {skipped:.0f}" if skipped else "")
                asked = parallel.loudest(stop.signal)  # all stop at the same step, or none
                if asked and progress.step < progress.steps:
                    work.close()
                    parallel.loudest(0)  # none leaves before rank 0 has saved
                    at = f"{progress.step} of {progress.steps}"
                    bar.say(f"stopped at step {at}, saved in {where}")
                    return asked
    return 0


def _preparing(stop: Stop, bar: Bar, what: str, done: int, total: int) -> None:
    """Show a preparation, and end it where that was asked for."""
    if stop.signal:
        bar.say("stopped before the first step; the same command continues")
        raise SystemExit(stop.code(stop.signal))
    if done < total:
        bar.beside(what, done, total)


def found_again(run: Path, teacher: str) -> None:
    """Record where the teacher of the run folder `run` is now; a ValueError if it is another."""
    teacher_of(RunFolder(run), local(teacher))


def measured(path: Path, samples: int, draws: int) -> Metrics:
    """Measure the run in `path`, its teacher and real data; writes and returns metrics.json."""
    folder = RunFolder(path)
    facts = folder.facts()
    folder.refuse_unfinished()
    domain: Domain = decoded(facts["run"].get("domain"), Domain, path)
    yardstick = domain.yardstick()
    if yardstick is None:
        raise ValueError(
            f"{path} cannot be measured: its domain, {type(domain).__name__}, has no yardstick; "
            "'fewstep evaluate' can by --protocol fid50k, or by --prompts where it takes them; "
            "'fewstep report' shows what it makes"
        )
    models = {"student" if facts.get("distils", True) else "teacher": load_student(path)}
    if "student" in models and (teacher := load_teacher(domain, teacher_of(folder))):
        models = {"teacher": teacher, **models}
    metrics: Metrics = {"real": real_scores(yardstick)}
    for role, model in models.items():
        metrics[role] = _scores(role, model, yardstick, samples, draws)
    stored: dict[str, Any] = {
        **metrics,
        "protocol": {"samples": samples, "draws": draws, "distance": yardstick.distance},
    }
    write_json(path / "metrics.json", stored)
    return metrics


def _scores(
    role: str, generator: Generator, yardstick: Yardstick, samples: int, draws: int
) -> dict[str, float]:
    """All draws of one generator, with a bar."""
    scores: dict[str, float] = {}
    with Bar(f"measuring {role}", draws) as bar:
        for scores in evaluate(generator, yardstick, samples, draws):
            bar.update(int(scores["draws"]))
    return scores


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as aligned text, mean +- standard deviation over the draws."""
    names = [n for n in next(iter(metrics.values())) if not n.endswith("_std") and n != "draws"]
    lines = [" " * 14 + "".join(f"{role:>22}" for role in metrics)]
    for name in names:
        cells = []
        for scores in metrics.values():
            spread = scores.get(f"{name}_std", 0.0)
            value = f"{scores[name]:.4g}" if name in scores else "-"
            cells.append(value + (f" +- {spread:.2g}" if spread else ""))
        lines.append(f"{name:14}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def few_threads() -> None:
    """At most two threads, unless the person says otherwise: small networks gain no more."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, torch.get_num_threads()))


def demonstrate(out: Path, seed: int, command: str) -> int:
    """Teacher, student, measurements, report; steps that are done already are not repeated."""
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
    print(table(metrics))
    print(f"\nreport: {write_report(out)}")
    return 0
