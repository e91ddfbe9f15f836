"""What is told of files is what they hold."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.storage.files import write_folder
from fewstep.teachers.facts import of_file, of_model, of_pipeline
from tests.conftest import Folders


def test_a_safetensors_file_is_counted_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4).bfloat16(), "n": torch.zeros(()).long()}
    save_file(tensors, path, {"made": "here"})
    assert of_file(path) == {
        "what": "safetensors file",
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tensors": 3,
        "numbers": 11,
        "types": {"float32": 1, "bfloat16": 1, "int64": 1},
        "metadata": {"made": "here"},
    }


def test_a_folder_of_unknown_kind_is_told_by_its_manifest(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", {"note.txt": b"abc"}, {"step": 7, "method": "SiD()"})
    sha = hashlib.sha256(b"abc").hexdigest()
    facts = of_model(tmp_path / "c")
    assert facts["what"] == "checkpoint, digests correct"
    assert (facts["step"], facts["method"]) == (7, "SiD()")
    assert facts["files"] == {"note.txt": {"bytes": 3, "sha256": sha}}
    (tmp_path / "c" / "note.txt").write_bytes(b"abd")
    with pytest.raises(ValueError, match="damaged"):
        of_model(tmp_path / "c")
    with pytest.raises(ValueError, match="holds neither manifest"):
        of_model(tmp_path)


def test_a_pipeline_that_is_no_teacher_is_told_all_the_same(
    folders: Folders, tmp_path: Path
) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    facts = of_pipeline(folder)
    assert facts["as a teacher"]["predicts"] == "eps"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"sample"'))
    parts = facts["parts"]
    facts = of_pipeline(folder)
    assert facts["as a teacher"].startswith("cannot be used: ")
    assert facts["parts"] == parts
