"""fewstep sample: what --walk, --vary and --steps write is what the Python calls make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
    assert "this student is at its best in its own 1 call" in done.err
    student = open_model(finished / "runs/sid")
    assert out.read_bytes() == png(grid(student.in_steps(4).sample([3])))
    assert out.read_bytes() != png(grid(student.sample([3])))
    assert "best" not in fewstep(*ask, "--steps", "1").err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "3", "--walk", "4"), "--walk needs two --seeds: 3,8; got 1"),
        (("--seeds", "3-5", "--walk", "4"), "--walk needs two --seeds: 3,8; got 3"),
        (("--seeds", "3,8", "--walk", "1"), "in 2 pictures or more; got seeds 3 and 8, and 1"),
        (("--seeds", "3,8", "--walk", "1001"), "--walk makes 1,000 pictures at most, got 1,001"),
        (("--seeds", "3", "--vary", "0.4"), "--vary needs two or more --seeds, such as 3,100-107"),
        (("--seeds", "3,4", "--vary", "1.5"), "the share of noise is between 0 and 1, got 1.5"),
        (
            ("--seeds", "3,8", "--walk", "4", "--vary", "0.4"),
            "--walk, --vary and --from are different",
        ),
        (
            ("--seeds", "3,8", "--walk", "4", "--labels", "1,2"),
            "--walk makes pictures of one label, got 2",
        ),
    ],
    ids=range(8),
)
def test_refusals(finished: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    out = tmp_path / "out.png"
    done = fewstep("sample", str(finished / "runs/sid"), "--out", str(out), *flags)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not out.exists()
