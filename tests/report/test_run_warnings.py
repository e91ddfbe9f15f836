"""Warnings of a run in progress: each on what it is for, none on a sound run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import load_classes
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


def shortened(
    change: Callable[[list[dict[str, Any]]], None], count: int
) -> Callable[[list[dict[str, Any]]], None]:
    """A change of a run that had but the first looks."""

    def changed(looks: list[dict[str, Any]]) -> None:
        change(looks)
        del looks[count:]

    return changed


def second(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    """A run that had two looks, with these values at the second."""

    def changed(looks: list[dict[str, Any]]) -> None:
        del looks[2:]
        looks[1].update(values)

    return changed


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
    "noise for the most part": (edited(passed=0.9), []),
    "noise alone": (edited(passed=0.9999), [COLLAPSE]),
    "noise alone at step 49": (second(passed=0.9999, step=49), []),
    "noise alone at step 50": (second(passed=0.9999, step=50), [COLLAPSE]),
    "nothing, without real data": (edited(diversity=0.0, spread=0.0, real={}), [COLLAPSE]),
    "fake error at its limit": (errors(1.49), []),
    "fake error above": (errors(1.51), [LAGS]),
    "a copy for one look": (errors(1.0), []),
    "a copy at the only look": (shortened(errors(1.0, 1), 2), [LAGS]),
    "a copy at its beginning": (shortened(errors(1.0, 0), 1), []),
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


METHODS = '''
"""SiD whose student is pulled to where a run goes wrong."""

from dataclasses import dataclass

from fewstep.distillation.method import Loss
from fewstep.methods.sid import SiD


@dataclass(frozen=True)
class Constant(SiD):
    """One grey picture for every noise."""

    def student_loss(self, rollout, nets, teacher, batch):
        return Loss(((rollout(nets, batch) - 0.3) ** 2).mean())


@dataclass(frozen=True)
class Saturated(SiD):
    """Ever more contrast."""

    def student_loss(self, rollout, nets, teacher, batch):
        return Loss((1.5 - rollout(nets, batch).abs()).abs().mean())
'''


@pytest.mark.slow
def test_runs_that_are_spoilt(tmp_path: Path, known: dict[str, type]) -> None:
    """At the recipe's own looks, in 200 steps: the spoilt are warned of, the sound one is not."""
    (tmp_path / "spoilt.py").write_text(METHODS)
    spoilt = load_classes(tmp_path / "spoilt.py")
    teacher = replace(digits_teacher(), steps=400, batch=64, sample_every=400, save_every=400)
    assert isinstance(teacher.method, Pretrain)
    list(execute(teacher, tmp_path / "teacher", recipe="digits_teacher"))
    run = replace(digits(), model=MODEL, steps=200, batch=64, save_every=200)
    assert run.sample_every == 150
    fields = {x.name: getattr(run.method, x.name) for x in dataclasses.fields(run.method)}
    optim = run.optim
    runs = {
        "sound": run,
        "constant": replace(run, method=spoilt.Constant(**fields)),
        "rate": replace(run, optim=replace(optim, lr=100 * optim.lr)),
        "frozen": replace(run, fake_optim=replace(optim, lr=1e-12)),
        "saturated": replace(run, method=spoilt.Saturated(**fields)),
    }
    found = {name: _warned(one, tmp_path, name) for name, one in runs.items()}
    assert found["sound"] == set()
    assert COLLAPSE in found["constant"]
    assert DIVERGES in found["rate"]
    assert found["frozen"] == {LAGS}
    assert SATURATE in found["saturated"]


def _warned(run: Any, home: Path, name: str) -> set[str]:
    steps = execute(run, home / name, recipe="digits", teacher=str(home / "teacher"))
    assert len(list(steps)) >= run.steps
    return {warning.name for warning in run_warnings(read_run(home / name))}
