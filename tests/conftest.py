"""Fixtures of more than one file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.command import DISTIL, TEACH, fewstep

LONGEST = "storage/test_bounded_reading.py"
"""A test of a minute, which would be left for one process alone if it began last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test; refuse ids with an address, which differ between processes."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)
    for item in items:
        assert " at 0x" not in item.nodeid, f"{item.nodeid[:200]}: give its cases ids"


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Each test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def small_looks() -> Iterator[None]:
    """A run looks at 100 of its samples, not at 1,000: at how good they are nothing looks here."""
    from fewstep.runs import monitor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "LOOK", 50)
        patch.setattr(monitor, "SCORED", 100)
        yield


@pytest.fixture
def known() -> Iterator[dict[str, type]]:
    """The configuration classes; those that a test loads from files are forgotten after it."""
    from fewstep import config

    before = set(config.known())
    yield config.known()
    for name in set(config.known()) - before:
        del config.known()[name]


def once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that the first process to ask makes, for all of them."""
    home = temporary.getbasetemp()
    home = home.parent / name if "PYTEST_XDIST_WORKER" in os.environ else home / name
    done = home.parent / f"{name}.done"
    with FileLock(home.parent / f"{name}.lock"):
        if not done.exists():
            home.mkdir()
            make(home)
            done.touch()
    return home


def state(home: Path) -> set[tuple[str, int, int]]:
    """The files of a folder, with their sizes and times."""
    files = ((f, f.stat()) for f in home.rglob("*") if f.is_file())
    return {(str(f), info.st_size, info.st_mtime_ns) for f, info in files}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two finished runs: runs/teacher and runs/sid. Read it, leave it as it is."""

    def make(home: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            assert fewstep(*TEACH, "--out", "runs/teacher").code == 0
            assert fewstep(*DISTIL, "--teacher", "runs/teacher", "--out", "runs/sid").code == 0

    home = once(tmp_path_factory, "finished", make)
    first = state(home)
    yield home
    assert state(home) == first, f"a test has changed {home}"


Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny pipeline by its kind. Read it, leave it as it is."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests import tiny_pipelines

    made: dict[str, tuple[Path, set[tuple[str, int, int]]]] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            with torch.random.fork_rng():
                home = once(tmp_path_factory, kind, partial(tiny_pipelines.build, kind)) / "pipe"
            made[kind] = home, state(home)
        home, first = made[kind]
        assert state(home) == first, f"an earlier test of this process has changed {home}"
        return home

    return folder
