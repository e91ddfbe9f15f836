"""Tiny pipeline folders, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny pipeline by its kind. Read it, leave it as it is."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests.pipelines import tiny

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.build(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder
