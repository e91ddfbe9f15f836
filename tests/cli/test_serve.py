"""fewstep serve: which models it opens, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from fewstep.cli.serve import open_sides, refuse_unlike
from fewstep.domains.ring import Ring
from tests.command import fewstep


def test_the_teacher_is_the_run_s_own(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named from here where it is below; another one where it is asked for, or none."""
    monkeypatch.chdir(finished)
    student, teacher = open_sides(Path("runs/sid"), "", False, "", "cpu")
    assert (student.opened.path, teacher.opened.path) == ("runs/sid", "runs/teacher")
    assert (student.generator.sampler.calls, teacher.generator.sampler.calls) == (1, 35)
    other = open_sides(Path("runs/sid"), "runs/sid", False, "", "cpu")
    assert other[1].opened.path == "runs/sid"
    assert len(open_sides(Path("runs/sid"), "", True, "", "cpu")) == 1
    assert len(open_sides(Path("runs/teacher"), "", False, "", "cpu")) == 1
    assert len(open_sides(Path("runs/sid/student"), "", False, "", "cpu")) == 1
    assert capsys.readouterr().err == ""


def test_a_teacher_that_is_gone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student is shown alone, with the reason; asked for by name, it is an error."""
    runs = tmp_path / "runs"
    shutil.copytree(finished / "runs", runs)
    (runs / "teacher/student/model.safetensors").write_bytes(b"damaged")
    facts = (runs / "sid/run.json").read_text().replace(str(finished), str(tmp_path))
    (runs / "sid/run.json").write_text(facts)
    assert len(open_sides(runs / "sid", "", False, "", "cpu")) == 1
    assert "the teacher is not shown: " in capsys.readouterr().err
    done = fewstep("serve", str(runs / "sid"), "--teacher", str(runs / "teacher"))
    assert (done.code, done.out) == (2, "")


def test_models_that_cannot_be_compared(finished: Path) -> None:
    ring, digits = Ring().exact(), open_sides(finished / "runs/sid", "", True, "", "cpu")[0]
    with pytest.raises(
        ValueError, match=r"the teacher's shape of samples is \(2,\), the student's"
    ):
        refuse_unlike(digits.generator, ring)


def test_refusals(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sid = str(finished / "runs/sid")
    for args, message in {
        (sid, "--port", "70000"): "--port is a number from 0 to 65535, got 70000",
        (sid, "--teacher", sid, "--no-teacher"): "--teacher and --no-teacher contradict",
        ("nowhere",): "nowhere",
        (sid, "--device", "abacus"): "this machine has no device 'abacus'",
    }.items():
        done = fewstep("serve", *args)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
        assert len(done.err.splitlines()) == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert "needs uvicorn; install it with: pip install 'fewstep[serve]'" in (
        fewstep("serve", sid).err
    )
