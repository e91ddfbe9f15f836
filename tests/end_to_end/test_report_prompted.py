"""What the report says of a run that takes prompts: its own commands, its own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.model import Model
from fewstep.pipelines.net import Diffusers
from fewstep.recipes.captions import Captions
from fewstep.recipes.t2i import Prompts
from fewstep.report.findings import read
from fewstep.report.headline import headline, measuring
from fewstep.spec import encode
from tests.end_to_end.report_folder import edit, invented


def change(path: Path, **fields: Any) -> None:
    """Other fields of the stored run."""
    edit(path / "run.json", lambda facts: facts["run"].update(fields))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on prompts that nobody has measured; it never ran."""
    path = tmp_path / "run"
    invented(path)
    (path / "metrics.json").unlink()
    net = Diffusers("UNet2DConditionModel", "{}", 12, 32)
    change(path, model=encode(Model(net, (4, 8, 8))), domain=encode(Prompts(file="my.txt")))
    return path


def test_the_command_that_measures_it(run: Path) -> None:
    """With its own prompts and CLIP, else a word in their place; it can be pasted."""
    assert measuring(read(run)) == f"fewstep evaluate {run} --prompts my.txt --clip CLIP"
    change(run, domain=encode(Prompts(file="my own.txt", clip="../tiny-clip")))
    asked = f"fewstep evaluate {run} --prompts 'my own.txt' --clip ../tiny-clip"
    assert measuring(read(run)) == asked
    told = headline(read(run), [])
    assert told.title == "Finished, but not measured yet."
    assert told.text.endswith(f"Measure it with: {asked}")
    change(run, domain=encode(Captions(folder="pictures")))
    assert measuring(read(run)) == f"fewstep evaluate {run} --prompts FILE --clip CLIP"
    invented(run.parent / "labels")
    assert measuring(read(run.parent / "labels")) == f"fewstep evaluate {run.parent / 'labels'}"
