"""What is inside a model file or folder, as facts; nothing is executed, no network is run.

`inspect_model` reads what can be a teacher, as its format tells it (`fewstep.teachers.formats`):
snapshots and training states of EDM, EDM2, SiD and SiDA, safetensors files, finished models,
checkpoints and pipelines of diffusers; and run folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.runs.run_folder import RunFolder
from fewstep.storage.checkpoint import find_checkpoints
from fewstep.teachers.facts import Facts
from fewstep.teachers.formats import format_of
from fewstep.teachers.snapshots import jsonable


def inspect_model(path: str | Path) -> Facts:
    """Facts about a model file or folder, for people and for JSON; nothing in it is executed.

    Arguments:
        path: a snapshot or training state (.pkl, .pt), a safetensors file, or a folder with a
            finished model, a checkpoint, a run or a diffusers pipeline.
    Returns a dictionary of JSON values: what it is, sizes and digests, tensors by type, settings.
    Raises ValueError where it is none of these, or is damaged.
    """
    path = Path(path)
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
    run = (path / "run.json").is_file()
    facts = _run(path) if run else format_of(path).facts(path)
    return {key: value for key, value in jsonable(facts).items() if value not in ({}, [])}


def _run(path: Path) -> Facts:
    folder = RunFolder(path)
    facts = folder.facts()
    settings = {
        key: facts[key] for key in ("recipe", "command", "teacher", "run") if facts.get(key)
    }
    return {
        "what": "run folder, finished" if folder.finished else "run folder, not finished",
        "folder": str(path),
        **settings,
        "checkpoints": [p.name for p in find_checkpoints(folder.checkpoints)],
        "student": format_of(folder.student).facts(folder.student) if folder.finished else {},
    }


def as_lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as aligned text; groups are indented below their name."""
    flat = [key for key, value in facts.items() if not isinstance(value, dict) or not value]
    width = max(map(len, flat), default=0)
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}"
            yield from as_lines(value, f"{indent}  ")
        else:
            yield f"{indent}{key:{width}}  {_text(value)}"


def _text(value: Any) -> str:
    if value in ({}, [], "", None):
        return "none" if value != "" else "''"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 400 else f"{text[:397]}..."
