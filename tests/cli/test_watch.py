"""fewstep watch: what it refuses, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import fewstep


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no/such/run"], "no/such/run"),
        (["x", "--port", "70000"], "--port is a number from 0 to 65535, got 70000"),
        (["x", "--prt", "1"], "--prt"),
    ],
)
def test_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = fewstep("watch", *args)
    assert answer.code == 2
    assert words in answer.err
