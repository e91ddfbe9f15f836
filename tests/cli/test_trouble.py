"""When something goes wrong while it runs, the demo in small, and the doctor."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import doctor, measure
from fewstep.losses import score
from fewstep.nets.mlp import MLP
from fewstep.recipes import digits as recipes
from fewstep.runs.monitor import Monitor
from fewstep.runs.run import Run
from tests.cli.test_cli import WEIGHTS, interrupt
from tests.command import DISTIL, SMALL, fewstep, tree
from tests.storage.test_checkpoint import damage

LOSS = "denoiser: loss and grad_norm not finite in 3 updates in a row, up to step "


def test_a_damaged_checkpoint_is_told_and_the_one_before_continues(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 17, 2)
        assert fewstep(*args).code == 130
    kept = sorted(p.name for p in Path("x/checkpoints").iterdir())
    assert kept == ["step-00000016", "step-00000017"]
    damage(Path("x/checkpoints/step-00000017/optim-fake.safetensors"), 999, 4)
    done = fewstep(*args)
    assert done.code == 0
    assert done.err.splitlines()[:2] == [
        "x/checkpoints/step-00000017/optim-fake.safetensors is damaged: its SHA-256 is not the "
        "recorded one; set aside as step-00000017.damaged",
        "continuing from step 16 of 20",
    ]
    expected = finished / "runs" / "sid" / WEIGHTS
    assert Path("x", WEIGHTS).read_bytes() == expected.read_bytes()


def test_a_run_without_a_sound_checkpoint_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Twice the same answer, and nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 5, 2)
        fewstep(*args)
    damage(Path("x/checkpoints/step-00000005/nets.safetensors"), 999, 4)
    for _ in range(2):
        log = Path("x/log.jsonl").read_bytes()
        refused = fewstep(*args)
        assert refused.code == 2
        assert refused.err.startswith("fewstep: no checkpoint in x/checkpoints is sound (")
        assert refused.err.endswith("); choose another --out folder to start anew\n")
        assert refused.err.count("\n") == 1
        assert Path("x/log.jsonl").read_bytes() == log


def test_a_running_run_is_left_alone(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The same command while the first still runs; the first ends as if alone."""
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    log, second = Monitor.log, []

    def logging(self: Monitor, record: Any) -> None:
        log(self, record)
        if record.step == 5:
            second.append(fewstep(*args))

    monkeypatch.setattr(Monitor, "log", logging)
    assert fewstep(*args).code == 0
    sentence = "x is in use by another process; wait for it, or choose another --out"
    assert second == [(2, "", f"fewstep: {sentence}\n")]
    assert Path("x", WEIGHTS).read_bytes() == (finished / "runs/sid" / WEIGHTS).read_bytes()


def test_a_diverging_run_stops_with_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    """Exit code 1: the input was not wrong. What was skipped is in the log."""
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", "50", "--optim.lr", "1e30", "--patience", "3", "--out", "x")
    code, out, err = fewstep("train", "digits_teacher", *SMALL, *flags)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"fewstep: {LOSS}")
    assert err.endswith("; lower the learning rate, or look at the data and the teacher\n")
    log = [json.loads(line) for line in Path("x/log.jsonl").read_text().splitlines()]
    assert log[-1]["skipped"] == 2.0
    assert not Path("x/student").exists()


def test_a_number_beyond_64_bits_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    batch = ("--batch", str(10**20), "--steps", "2", "--dry-run")
    result = fewstep("train", "digits_teacher", *SMALL[:4], *batch)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("fewstep: a number is too large to be computed with (")
    monkeypatch.setenv("FEWSTEP_DEBUG", "1")
    with pytest.raises(OverflowError):
        fewstep("train", "digits_teacher", *SMALL[:4], *batch)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", failing)
    result = fewstep("train", "digits_teacher", *SMALL, "--steps", "2", "--out", "x")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith("fewstep: x/run.json: No space left on device; free some space")
    monkeypatch.setenv("FEWSTEP_DEBUG", "1")  # for the one who wants to know where
    with pytest.raises(OSError, match="No space left"):
        fewstep("train", "digits_teacher", *SMALL, "--steps", "2", "--out", "x")


@pytest.mark.usefixtures("known")
def test_a_method_of_ones_own_goes_all_the_way(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Distil, continue, sample and evaluate: only the first two need the file."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom fewstep.methods.sid import SiD\n\n"
        "@dataclass(frozen=True)\nclass Mine(SiD):\n    alpha: float = 0.75\n"
    )
    teacher = ("--teacher", str(finished / "runs" / "teacher"))
    args = (*DISTIL, *teacher, "--method", "mine.py:Mine(weight=Power())", "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 5, 2)
        assert fewstep(*args).code == 130
    assert fewstep(*args).err.splitlines()[0] == "continuing from step 5 of 20"
    Path("mine.py").unlink()
    facts = json.loads(Path("x/run.json").read_text())
    assert facts["run"]["method"]["type"] == "Mine"
    assert facts["run"]["method"]["alpha"] == 0.75
    assert fewstep("evaluate", "x", "--samples", "100", "--draws", "1").code == 0
    assert json.loads(Path("x/metrics.json").read_text())["student"]["calls"] == 1.0
    assert fewstep("sample", "x").code == 0


def test_the_demo_in_small(tmp_path: Path, monkeypatch: Any) -> None:
    """Teacher, student, numbers and report; the second time everything is there already."""
    monkeypatch.chdir(tmp_path)

    def small(make: Any, steps: int) -> Run:
        run: Run = make()
        model = replace(run.model, net=MLP(16, 1))
        return replace(run, model=model, batch=8, steps=steps, sample_every=steps)

    for name, steps in (("digits_teacher", 20), ("digits", 6)):
        make = getattr(recipes, name)
        monkeypatch.setattr(recipes, name, partial(small, make, steps))
    measured = measure.measured
    monkeypatch.setattr(measure, "measured", lambda path, **_: measured(path, 200, 2))
    code, out, err = fewstep("demo", "--out", "d", "--seed", "3")
    assert (code, out.splitlines()[-1]) == (0, "report: d/report.html")
    assert "finished: d/teacher\n" in err
    assert json.loads(Path("d/run.json").read_text())["run"]["seed"] == 3
    assert list(json.loads(Path("d/metrics.json").read_text())) == [
        *("real", "teacher", "student", "protocol")
    ]
    before = {k: v for k, v in tree(tmp_path).items() if k != "d/report.html"}
    monkeypatch.setattr(measure, "measured", None)
    again = fewstep("demo", "--out", "d", "--seed", "3")
    assert again.code == 0
    assert again.out == out
    assert "d/teacher is finished already" in again.err
    assert {k: v for k, v in tree(tmp_path).items() if k != "d/report.html"} == before
    other = fewstep("demo", "--out", "d", "--seed", "4")
    assert other.code == 2
    assert "in use by a run with other settings (run.seed was 3, now 4)" in other.err


def test_the_doctor(monkeypatch: Any) -> None:
    """Its self-test is a gradient against a closed form, and a wrong gradient is a problem."""
    assert doctor.gradient_error() < 0.01
    assert doctor.gradient_error(20_000) != doctor.gradient_error()
    code, out, err = fewstep("doctor")
    assert code == (1 if err else 0)
    assert "SiD gradient against its closed form: 0." in out
    sid = score.sid
    monkeypatch.setattr(score, "sid", lambda x, real, fake, alpha: sid(x, real, fake, alpha=0.5))
    assert doctor.gradient_error() > 0.05
    code, out, err = fewstep("doctor")
    assert code == 1
    assert "problem: the SiD gradient differs from its closed form; reinstall torch\n" in err
