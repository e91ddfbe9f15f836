"""fewstep sample: flags that contradict each other, or ask for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import fewstep


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
