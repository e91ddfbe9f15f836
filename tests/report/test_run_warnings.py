"""Warnings of a run in progress: each on what it is for, none on a sound run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.methods.pretrain import Pretrain
from fewstep.recipes.digits import MODEL, digits, digits_teacher
from fewstep.report.run_data import read_run
from fewstep.report.run_warnings import run_warnings
from fewstep.runs.runner import execute
from tests.report_folder import invented

REAL = {"extremes": 0.58, "diversity": 0.57, "spread": 0.75}
DIVERGES, COLLAPSE, SATURATE = "Training diverges", "Diversity collapses", "Values saturate"
LAGS, LEAVE = "The fake score lags behind", "Samples leave what was asked for"


def look(i: int) -> dict[str, Any]:
    """A look of a run that does well: from a blurred mean to the real data."""
    levels = [{"t": 1.0, "fisher": 1.0, "teacher_error": 1.0, "fake_error": 1.0 - 0.1 * (i > 0)}]
    quick = {"samples": 100, "fd_digits": 13.0 - i, "accuracy": 0.97}
    line = {"step": 50 * i, "images": i, "diversity": 0.18 + 0.02 * i, "spread": 0.6}
    return {**line, "extremes": 0.2, "levels": levels, "quick": quick, "real": REAL}


def names(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> list[str]:
    looks = [look(i) for i in range(4)]
    change(looks)
    (path / "gauges.jsonl").write_text("\n".join(map(json.dumps, looks)))
    return [warning.name for warning in run_warnings(read_run(path))]


def edited(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda looks: looks[-1].update(values)


def quick(**values: float) -> Callable[[list[dict[str, Any]]], None]:
    return lambda looks: looks[-1]["quick"].update(values)


def errors(value: float, since: int = 3) -> Callable[[list[dict[str, Any]]], None]:
    def change(looks: list[dict[str, Any]]) -> None:
        for line in looks[since:]:
            line["levels"][0]["fake_error"] = value

    return change


def constant(looks: list[dict[str, Any]]) -> None:
    for line in looks:
        line["diversity"] = 0.001


CASES: dict[str, tuple[Callable[[list[dict[str, Any]]], None], list[str]]] = {
    "sound": (lambda _: None, []),
    "distance at its limit": (quick(fd_digits=32.9), []),
    "distance above": (quick(fd_digits=33.1), [DIVERGES]),
    "spread": (edited(spread=2.3), [DIVERGES, SATURATE]),
    "contrast at its limit": (edited(spread=0.97), []),
    "contrast": (edited(spread=0.98), [SATURATE]),
    "ends at their limit": (edited(extremes=0.78), []),
    "ends": (edited(extremes=0.80), [SATURATE]),
    "diversity above half its best": (edited(diversity=0.12), []),
    "diversity fell": (edited(diversity=0.10), [COLLAPSE]),
    "constant": (constant, [COLLAPSE]),
    "fake error at its limit": (errors(1.49), []),
    "fake error above": (errors(1.51), [LAGS]),
    "a copy for one look": (errors(1.0), []),
    "a copy throughout": (errors(1.0, 1), [LAGS]),
    "accuracy at its limit": (quick(accuracy=0.68), []),
    "accuracy lost": (quick(accuracy=0.67), [LEAVE]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_limit(tmp_path: Path, case: str) -> None:
    invented(tmp_path / "run")
    change, expected = CASES[case]
    assert names(tmp_path / "run", change) == expected


def test_skipped_updates(tmp_path: Path) -> None:
    invented(tmp_path / "run")
    line = {"step": 20, "images": 1, "skipped": 2, "student/loss": "nan"}
    (tmp_path / "run/log.jsonl").write_text(json.dumps(line) + "\n")
    warning, *more = run_warnings(read_run(tmp_path / "run"))
    assert warning.found == "2 updates skipped in 20 steps; student/loss at the last step."
    assert warning.advice.startswith("Lower the learning rate")
    assert more == []


@pytest.mark.slow
def test_runs_that_are_spoilt(tmp_path: Path) -> None:
    """A sound run has no warning in 200 iterations; spoilt ones have theirs."""
    teacher = replace(digits_teacher(), steps=400, batch=64, sample_every=400, save_every=400)
    assert isinstance(teacher.method, Pretrain)
    list(execute(teacher, tmp_path / "teacher", recipe="digits_teacher"))
    run = replace(digits(), model=MODEL, steps=200, batch=64, sample_every=50, save_every=200)
    optim = run.optim
    found = {}
    spoilt = {
        "sound": run,
        "rate": replace(run, optim=replace(optim, lr=100 * optim.lr)),
        "frozen": replace(run, fake_optim=replace(optim, lr=1e-12)),
    }
    for name, one in spoilt.items():
        found[name] = _warned(one, tmp_path, name)
    assert found["sound"] == set()
    assert DIVERGES in found["rate"]
    assert found["frozen"] == {LAGS}


def _warned(run: Any, home: Path, name: str) -> set[str]:
    steps = execute(run, home / name, recipe="digits", teacher=str(home / "teacher"))
    assert len(list(steps)) >= run.steps
    return {warning.name for warning in run_warnings(read_run(home / name))}
