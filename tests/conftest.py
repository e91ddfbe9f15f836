"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import DISTIL, TEACH, fewstep


@pytest.fixture
def known() -> Iterator[dict[str, type]]:
    """The configuration classes; those that a test loads from files are forgotten after it."""
    from fewstep import config

    before = set(config.known())
    yield config.known()
    for name in set(config.known()) - before:
        del config.known()[name]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: runs/teacher and runs/sid. Read it, leave it as it is."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fewstep(*TEACH, "--out", "runs/teacher").code == 0
        assert fewstep(*DISTIL, "--teacher", "runs/teacher", "--out", "runs/sid").code == 0
    return home


Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny pipeline by its kind. Read it, leave it as it is."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests import tiny_pipelines

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_pipelines.build(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
