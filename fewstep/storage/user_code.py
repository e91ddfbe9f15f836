"""Copies of the user's own classes, stored with what was made with them, run only on request.

A method, sampler, domain or network of one's own (`--method my_file.py:MyMethod`) is a class that
nobody else has. Its file is therefore copied into the run folder (code/) and, where the network or
its sampler need it, into the model folder; run.json and model.json hold its SHA-256 by class.
A copy is never run by itself: whoever reads the folder names the file (`--code FILE`), which is
run if its digest is one that was recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.config import OwnFile, decode, known, load_own, source
from fewstep.storage.files import digest, read_json, write

CODE = "code"
"""The folder of copies in a run folder; a model folder has them beside its other files."""
DEPTH = 4
"""Teachers of teachers that are looked through."""


@dataclass(frozen=True)
class Recorded:
    """A class of the user's own that a folder was made with."""

    name: str
    sha256: str
    """Of its file."""
    copy: Path | None
    """Where the folder has that file, unless it is lost or altered."""


def copies(sources: Iterable[OwnFile]) -> dict[str, bytes]:
    """The content of the files by name; a second one of the same name is "mine-1f3a5c7e.py"."""
    files: dict[str, bytes] = {}
    for file in sources:
        name = file.path.name
        if files.setdefault(name, file.data) != file.data:
            files[f"{file.path.stem}-{file.sha256[:8]}.py"] = file.data
    return files


def keep(folder: Path, sources: Iterable[OwnFile]) -> None:
    """Copy the files into the code folder of a run."""
    for name, data in copies(sources).items():
        (folder / CODE).mkdir(exist_ok=True)
        write(folder / CODE / name, data)


def recorded(folder: Path, depth: int = DEPTH) -> list[Recorded]:
    """The user's own classes that a run or model folder, and its teachers, were made with."""
    classes: list[Recorded] = []
    inside = folder.name in ("student", "best")  # of a run folder
    for place in (folder, folder / "student", *([folder.parent] if inside else [])):
        for name in ("run.json", "model.json"):
            if not (place / name).is_file():
                continue
            facts = read_json(place / name)
            if not isinstance(facts, dict):
                continue
            files = facts.get("files")
            for cls, sha in files.items() if isinstance(files, dict) else ():
                classes.append(Recorded(str(cls), str(sha), _copy(place, sha)))
            for key in ("teacher", "init") if name == "run.json" and depth else ():
                if isinstance(other := facts.get(key), str) and other:
                    classes += recorded(place / other, depth - 1)
    return classes


def _copy(place: Path, sha256: object) -> Path | None:
    """The Python file in a folder, or in its code folder, with this digest."""
    for path in sorted([*(place / CODE).glob("*.py"), *place.glob("*.py")]):
        if path.is_file() and digest(path) == sha256:
            return path
    return None


def trust(files: Sequence[Path], folders: Iterable[Path | str]) -> None:
    """Run `files`, each of which one of `folders` was made with; ValueError for any other."""
    if not files:
        return
    where = [Path(folder) for folder in folders if str(folder)]
    every = [item for folder in where if folder.is_dir() for item in recorded(folder)]
    names = " and ".join(map(str, where))
    read = [OwnFile.read(file) for file in files]
    for file in read:
        if file.sha256 in {item.sha256 for item in every}:
            continue
        if not every:
            raise ValueError(f"{names} was made with no code of its own: leave out --code")
        known_as = ", ".join(
            f"{item.sha256[:16]} ({item.name}{f', {item.copy}' if item.copy else ''})"
            for item in every
        )
        raise ValueError(
            f"{file.path} is not what {names} was made with: its SHA-256 begins with "
            f"{file.sha256[:16]}, recorded is {known_as}"
        )
    for file in read:
        load_own(file)


def decoded(data: Any, expected: type, folder: Path) -> Any:
    """`decode` of what a folder holds; ValueError where its own classes are not loaded."""
    names = set(_names(data))
    for item in (item for item in recorded(folder, 0) if item.name in names):
        cls = known().get(item.name)
        if cls is None:
            raise ValueError(_sentence(item, folder))
        file = source(cls)
        if file is None or file.sha256 != item.sha256:
            whose = "fewstep has one" if file is None else f"{file.path} has another one"
            raise ValueError(
                f"{folder} was made with a class {item.name} of its own code, and {whose} of that "
                "name; read the folder without it"
            )
    return decode(data, expected)


def _names(data: Any) -> Iterable[str]:
    """The classes that encoded data names."""
    if isinstance(data, Mapping):
        if isinstance(name := data.get("type"), str):
            yield name
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for item in data:
            yield from _names(item)


def _sentence(item: Recorded, folder: Path) -> str:
    made = f"{folder} was made with {item.name}, a class of code of its own"
    if item.copy is None:
        return (
            f"{made}, of which no copy is there any more; add --code FILE with the file whose "
            f"SHA-256 begins with {item.sha256[:16]}"
        )
    return f"{made}; read {item.copy}, and if you trust it add --code {item.copy}"
