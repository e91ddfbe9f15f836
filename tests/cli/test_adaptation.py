"""The run of an adaptation: what is taken from the student, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.cli.adaptation import base_of, refuse, started
from fewstep.nets.lora import LoRA
from fewstep.recipes.digits import digits, digits_teacher
from fewstep.storage.model_folder import model_description


def test_the_student_gives_its_network(finished: Path) -> None:
    student = finished / "runs/sid"
    run = replace(digits(), lora=LoRA(2))
    model = model_description(student)
    assert model != run.model
    assert started(run, str(student)) == replace(run, model=model, steps=300, lora=None)
    assert base_of(str(student)) == str(finished / "runs/teacher")


def test_without_a_fake_score_there_is_nothing_to_continue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(digits())
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        refuse(digits_teacher())
    assert "Pretrain has no fake score" in capsys.readouterr().err


def test_the_base_of_a_pipeline_has_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(SystemExit):
        base_of(str(tmp_path))
    assert "what the student was distilled from: --base FOLDER" in capsys.readouterr().err
