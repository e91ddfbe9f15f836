"""From the command to the loss: what lies in between is short enough to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import DISTIL, TEACH, fewstep

METHOD = '''
"""SiD, whose student says where it was called from."""

import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fewstep
from fewstep import Turn
from fewstep.methods.sid import SiD as Plain


@dataclass(frozen=True)
class Traced(fewstep.Method):
    sampler: fewstep.Sampler = fewstep.FewStep(2.5)

    def turns(self, step):
        fake, student = Plain(self.sampler).turns(step)
        return fake, Turn("student", partial(traced, student.loss))


def traced(loss, nets, teacher, batch):
    home = str(Path(fewstep.__file__).parent)
    frames = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(home)]
    Path("frames.txt").write_text("\\n".join(frames))
    return loss(nets, teacher, batch)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METHOD)
    return tmp_path


def test_the_loss_is_seven_calls_below_the_command(here: Path) -> None:
    """The command, its verb, the bar, the run, its session, the loop, the gradient; the loss."""
    assert fewstep(*TEACH, "--out", "teacher", "--steps", "2").code == 0
    told = fewstep(
        *DISTIL,
        "--teacher",
        "teacher",
        "--out",
        "run",
        "--steps",
        "2",
        "--method",
        "mine.py:Traced",
    )
    assert told.code == 0, told.err
    frames = (here / "frames.txt").read_text().split()
    assert frames == ["main", "run_recipe", "perform", "execute", "_train", "train", "gradient"]
