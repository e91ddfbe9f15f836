"""The writers of the formats, and what a person is told of another model that the run holds."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.export.formats import FORMATS, export, notes, writer
from fewstep.storage.model_folder import load_student, save_model
from tests.command import fewstep


def test_every_format_has_its_writer() -> None:
    """A function of its own module that takes what the format says it takes."""
    for name, form in FORMATS.items():
        write = writer(name)
        assert (write.__name__, write.__module__.rpartition(".")[2]) == (f"to_{name}", form.module)
        first, second, *more = inspect.signature(write).parameters
        assert (first, second) == ("run", "out")
        assert {"rank", "pictures"} & {*more} == ({form.takes} if form.takes else set())


def test_every_format_has_its_row_in_the_docs_in_the_same_order() -> None:
    page = Path(__file__).parents[2] / "docs" / "export.md"
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| .+ \|$", page.read_text("utf-8"), re.M)
    assert rows == list(FORMATS), "the table in docs/export.md has a row for each of FORMATS"


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    for ask in (writer, lambda name: export(tmp_path, tmp_path / "x", name)):
        with pytest.raises(ValueError, match="there is no format 'onxn'; did you mean 'onnx'"):
            ask("onxn")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of digits, of 20 steps, that followed a metric."""
    home = Path(shutil.copytree(finished / "runs" / "sid", tmp_path / "sid"))
    facts = json.loads((home / "run.json").read_text())
    facts["run"]["best"]["metric"] = "quick.swd"
    (home / "run.json").write_text(json.dumps(facts))
    return home


def keep_best(home: Path, steps: int) -> None:
    """The model of an earlier look as the best."""
    made: Generator = load_student(home)
    assert isinstance(made.sampler, FewStep)
    card = {**made.card, "steps": steps, "quick.swd": 0.0321}
    save_model(home / "best", made.denoiser.state_dict(), made.model, made.sampler, card)


def test_a_best_model_is_told_of(run: Path, tmp_path: Path) -> None:
    keep_best(run, 10)
    done = fewstep("export", str(run), str(tmp_path / "sid.pt2"), "--to", "pt2")
    assert done.code == 0
    told = "this is the last model, of step 20; the best, of step 10 (quick.swd 0.0321), is in "
    assert done.err.splitlines()[-1].startswith(f"{told}{run / 'best'}: export that folder")
    assert "| training | 160 samples in 20 steps |" in (tmp_path / "sid.pt2.md").read_text()
    assert list(notes(run / "best", "pt2")) == []


def test_nothing_is_told_where_there_is_no_other(run: Path) -> None:
    assert list(notes(run, "pt2")) == []
    keep_best(run, 20)
    assert list(notes(run, "pt2")) == []
