"""Digits restored, small: conditions from the domain when a run is sampled, measured, exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.data import digits as data
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Bridge
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.scale_wise import enlarged, reduced
from fewstep.domains.digits import Digits
from fewstep.export.pt2_onnx import PT2_TOLERANCE, to_pt2
from fewstep.nets.beside import Beside
from fewstep.nets.mlp import MLP
from fewstep.recipes import restoration
from fewstep.runs.run import Run
from fewstep.storage.model_folder import load_student
from tests.command import bits, fewstep
from tests.methods.test_runs import finish

SMALL = Model(Beside(MLP(16, 1)), data.SHAPE, path=Bridge(), sigma_data=data.SIGMA_DATA)


def small(run: Run, steps: int) -> Run:
    return replace(run, model=SMALL, steps=steps, batch=4, save_every=2, sample_every=steps)


@pytest.mark.slow
def test_a_run_from_teacher_to_program(tmp_path: Path) -> None:
    finish(small(restoration.restoration_teacher(), 2), tmp_path / "teacher", "")
    run = small(restoration.restoration(), 5)
    for name, stop in (("whole", 0), ("parts", 3), ("parts", 0)):
        finish(run, tmp_path / name, str(tmp_path / "teacher"), stop)
    assert bits(tmp_path / "whole" / "student") == bits(tmp_path / "parts" / "student")
    made = load_student(tmp_path / "whole")
    with pytest.raises(ValueError, match="sample it from the folder of its run"):
        made.sample(range(3))
    start = {"start": torch.zeros(3, 1, 8, 8)}
    assert made.sample(range(3), cond=start).shape == (3, 1, 8, 8)
    assert fewstep("sample", str(tmp_path / "whole"), "--out", str(tmp_path / "x.png")).code == 0
    found = fewstep("evaluate", str(tmp_path / "whole"), "--samples", "100", "--draws", "1")
    assert found.code == 0
    assert "fd_digits" in found.out
    assert fewstep("report", str(tmp_path / "whole")).code == 0
    assert to_pt2(tmp_path / "whole", tmp_path / "digits.pt2") < PT2_TOLERANCE


def test_what_is_restored() -> None:
    """Data and their copies belong together; what is shown is of digits that are held out."""
    domain, model = Digits(restore=2), SMALL
    _, held_out = data.load_digits()
    draws = Draws.range(0, 6)
    batch = domain.source(model, data_free=False)(draws)
    assert batch.x0 is not None
    assert torch.equal(batch.cond["start"], enlarged(reduced(batch.x0, 2), 2))
    free = domain.source(model, data_free=True)(draws)
    assert free.x0 is None
    assert torch.equal(free.cond["start"], batch.cond["start"])
    conditions = domain.conditions()
    assert conditions is not None
    shown = conditions(torch.tensor([0, 1, len(held_out.x0)]))["start"]
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[:2], enlarged(reduced(held_out.x0[:2], 2), 2))
    assert Digits().conditions() is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="restored come without labels"):
        Digits(restore=2).source(replace(SMALL, classes=10), True)
    with pytest.raises(ValueError, match=r"Digits\.restore is 0, 2, 4 or 8, got 3"):
        Digits(restore=3)
