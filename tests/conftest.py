"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.command import DISTIL, TEACH, fewstep


@pytest.fixture
def known() -> Iterator[dict[str, type]]:
    """The configuration classes; those that a test loads from files are forgotten after it."""
    from fewstep import spec

    before = set(spec.known())
    yield spec.known()
    for name in set(spec.known()) - before:
        del spec.known()[name]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: runs/teacher and runs/sid. Read it, leave it as it is."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fewstep(*TEACH, "--out", "runs/teacher").code == 0
        assert fewstep(*DISTIL, "--teacher", "runs/teacher", "--out", "runs/sid").code == 0
    return home
