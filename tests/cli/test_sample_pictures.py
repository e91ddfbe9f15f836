"""fewstep sample: what --walk, --vary and --steps write is what the Python calls make."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fewstep import open_model, variations, walk
from fewstep.data.image_grid import grid, png
from fewstep.diffusion.pixels import to_uint8
from tests.command import fewstep


def test_walks_and_variations_in_files(finished: Path, tmp_path: Path) -> None:
    """To the bit; of one label, which the file names for each."""
    student = open_model(finished / "runs/sid")
    ask = ("sample", str(finished / "runs/sid"), "--labels", "5", "--out")
    for flags, expected in {
        ("--seeds", "3,8", "--walk", "5"): walk(student, 3, 8, 5, label=5),
        ("--seeds", "3,100-102", "--vary", "0.4"): variations(
            student, 3, range(100, 103), 0.4, label=5
        ),
    }.items():
        out = tmp_path / "out.png"
        assert fewstep(*ask, str(out), *flags).code == 0
        assert out.read_bytes() == png(grid(expected))
        arrays = tmp_path / "out.npz"
        assert fewstep(*ask, str(arrays), *flags).code == 0
        with np.load(arrays) as stored:
            assert np.array_equal(stored["images"], to_uint8(expected).numpy())
            assert stored["labels"].tolist() == [5] * len(expected)
            assert stored["seeds"].tolist()[0] == 3


def test_a_student_in_more_steps(finished: Path, tmp_path: Path) -> None:
    """It is told that its own are better; and its own need no word."""
    out = tmp_path / "out.png"
    ask = ("sample", str(finished / "runs/sid"), "--seeds", "3", "--out", str(out))
    done = fewstep(*ask, "--steps", "4")
    assert "this model is at its best in its own 1 call" in done.err
    student = open_model(finished / "runs/sid")
    assert out.read_bytes() == png(grid(student.in_steps(4).sample([3])))
    assert out.read_bytes() != png(grid(student.sample([3])))
    assert "best" not in fewstep(*ask, "--steps", "1").err
