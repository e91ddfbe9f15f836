"""A run folder that holds its teacher can be moved as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fewstep.runs.run_folder import RunFolder
from tests.command import DISTIL, fewstep


def test_a_moved_run_finds_its_teacher(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the folder the teacher is stored relative to it, outside by its whole path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs" / "teacher", "x/teacher")
    assert fewstep(*DISTIL, "--teacher", "x/teacher", "--out", "x").code == 0
    assert json.loads(Path("x/run.json").read_text())["teacher"] == "teacher"
    Path("x").rename("moved")
    assert RunFolder(Path("moved")).facts()["teacher"] == str(tmp_path / "moved" / "teacher")
    scores = fewstep("evaluate", "moved", "--samples", "100", "--draws", "1")
    assert scores.code == 0
    assert "teacher" in scores.out
    again = fewstep(*DISTIL, "--teacher", "moved/teacher", "--out", "moved")
    assert again.code == 0
    assert "finished already" in again.err
    outside = json.loads((finished / "runs" / "sid" / "run.json").read_text())["teacher"]
    assert outside == str((finished / "runs" / "teacher").resolve())
