"""What is inside a model file or folder, as facts; nothing is executed, no network is run.

`inspect_model` reads snapshots and training states of EDM, EDM2, SiD and SiDA, safetensors files,
finished models, checkpoints, run folders and pipelines of diffusers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.runs.run_folder import RunFolder
from fewstep.safe_pickle import SnapshotObject, read_snapshot
from fewstep.storage.bounded_reading import regular
from fewstep.storage.checkpoint import COUNTERS, find_checkpoints
from fewstep.storage.files import digest, read_folder, read_json
from fewstep.storage.model_folder import KIND
from fewstep.storage.safetensors_header import header
from fewstep.teachers.diffusers.folder import is_pipeline, open_folder
from fewstep.teachers.diffusers.load import describe_network
from fewstep.teachers.snapshots import LICENCE, description, jsonable

Facts = dict[str, Any]

_TYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}


def inspect_model(path: str | Path) -> Facts:
    """Facts about a model file or folder, for people and for JSON; nothing in it is executed.

    Arguments:
        path: a snapshot or training state (.pkl, .pt), a safetensors file, or a folder with a
            finished model, a checkpoint, a run or a diffusers pipeline.
    Returns a dictionary of JSON values: what it is, sizes and digests, tensors by type, settings.
    Raises ValueError where it is none of these, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        facts = _folder(path)
    elif not path.is_file():
        kind = "not a regular file" if path.exists() else "missing"
        raise ValueError(f"{path} is {kind}")
    else:
        with regular(path) as file:
            head = file.read(16)
        named = head[4:9] == b"\0\0\0\0{"  # whose first byte, of a length, can be a pickle's
        if not named and (head[:1] == b"\x80" or head[:2] == b"PK"):
            facts = _snapshot(path)
        elif named or path.suffix == ".safetensors" or head[8:9] == b"{":
            facts = {"what": "safetensors file", **_file(path), **inspect_weights(path)}
        else:
            raise ValueError(
                f"{path} is no model file: neither a snapshot (.pkl, .pt) nor safetensors"
            )
    return {key: value for key, value in jsonable(facts).items() if value not in ({}, [])}


def _file(path: Path) -> Facts:
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": digest(path)}


def _count(tensors: Iterable[tuple[str, Iterable[int]]]) -> Facts:
    """Of (type, shape) pairs: how many, of how many numbers, of which types."""
    pairs = list(tensors)
    types = Counter(kind for kind, _ in pairs)
    return {
        "tensors": len(pairs),
        "numbers": sum(prod(shape) for _, shape in pairs),
        "types": dict(types.most_common()),
    }


def _state(state: Mapping[str, Tensor]) -> Facts:
    return _count((str(t.dtype).removeprefix("torch."), t.shape) for t in state.values())


def inspect_weights(path: Path) -> Facts:
    """Number, size and types of tensors, and metadata, from the header of a safetensors file."""
    head = header(path)
    pairs = [(_type(kind), head.shapes[name]) for name, kind in head.types.items()]
    return {**_count(pairs), **({"metadata": dict(head.metadata)} if head.metadata else {})}


def _type(name: str) -> str:
    """ "BF16" -> "bfloat16"."""
    letters = name.rstrip("0123456789")
    return _TYPES.get(letters, letters.lower()) + name[len(letters) :]


def _snapshot(path: Path) -> Facts:
    snapshot = read_snapshot(path)
    kind = "network snapshot" if snapshot.kind == "pickle" else "training state"
    return {
        "what": f"{kind} ({snapshot.kind}), read as data; nothing in it was executed",
        "file": str(path),
        "bytes": snapshot.size,
        "sha256": snapshot.sha256,
        "objects": {name: _found(found) for name, found in snapshot.objects.items()},
        "tensors": {name: _state(state) for name, state in snapshot.tensors.items()},
        "settings": snapshot.settings,
        "not read": snapshot.left,
        "licence": LICENCE,
    }


def _found(found: SnapshotObject) -> Facts:
    facts: Facts = {"class": found.class_name}
    if found.init_args:
        facts["unnamed"] = found.init_args
    facts["arguments"] = found.init_kwargs
    if found.state:
        facts |= _state(found.state)
        facts["network"] = _network(found)
    facts["arrays"] = {name: list(array.shape) for name, array in found.arrays.items()}
    facts["source"] = {"characters": len(found.source), "sha256": found.source_sha256}
    return {key: value for key, value in facts.items() if value != {} or key == "arguments"}


def _network(found: SnapshotObject) -> Any:
    """What fewstep would build of it, or why it would not."""
    try:
        model, net = description(found)
    except ValueError as error:
        return f"cannot be converted: {error}"
    expected = {name: t.shape for name, t in net.state_dict().items()}
    if expected != {name: t.shape for name, t in found.state.items()}:
        return "cannot be converted: its tensors are not those of its arguments"
    parameters = sum(p.numel() for p in net.parameters())
    return {"parameters": parameters, "shape": model.shape, "classes": model.classes}


def _folder(path: Path) -> Facts:
    if (path / "run.json").is_file():
        return _run(path)
    if is_pipeline(path):
        return _pipeline(path)
    if not (path / "manifest.json").is_file():
        raise ValueError(
            f"{path} is no model: it holds neither manifest.json nor run.json nor model_index.json"
        )
    manifest = read_folder(path)
    files = {name: _stored(path / name, sha) for name, sha in manifest["sha256"].items()}
    if manifest.get("kind") == KIND:
        details = read_json(path / "model.json")
        details = details if isinstance(details, dict) else {}
        return {"what": "finished model, digests correct", "folder": str(path), **details} | {
            "files": files
        }
    counters = {key: manifest[key] for key in (*COUNTERS, "method") if key in manifest}
    kind = str(manifest.get("kind", "checkpoint" if "step" in counters else "unknown"))
    what = f"{kind}, digests correct"
    return {"what": what, "folder": str(path), **counters, "files": files}


def _stored(path: Path, sha: str) -> Facts:
    """A file of a folder whose digest was checked."""
    facts = {"bytes": path.stat().st_size, "sha256": sha}
    return facts | inspect_weights(path) if path.suffix == ".safetensors" else facts


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
        "student": _folder(folder.student) if folder.finished else {},
    }


def _pipeline(path: Path) -> Facts:
    """A pipeline's parts, their files, and what fewstep would take of it, or why it would not."""
    folder = open_folder(path)
    parts: dict[str, Facts] = {}
    for part, kind in folder.parts.items():
        parts[part] = {"class": kind}
        if part in folder.files:
            weights = folder.files[part]
            parts[part] |= {"variant": weights.variant} if weights.variant else {}
            parts[part] |= {"files": {p.name: _size(p) for p in weights.files}}
    try:
        model = describe_network(folder)
        teacher: Any = {
            "shape": model.shape,
            "path": repr(model.path),
            "predicts": model.predicts,
            "tokens": getattr(model.net, "tokens", 0),
            "pixels": getattr(model.net, "pixels", 0),
        }
    except ValueError as error:
        teacher = f"cannot be used: {error}"
    return {
        "what": f"{folder.pipeline}, a pipeline of diffusers",
        "folder": str(path),
        "left out": folder.left_out,
        "parts": parts,
        "as a teacher": teacher,
        "not read": folder.unread,
        "sha256 of the encoders": folder.text_digest,
        "sha256 of the VAE": folder.vae_digest,
    }


def _size(path: Path) -> Facts:
    return {"bytes": path.stat().st_size, **inspect_weights(path)}


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
