"""What is inside a teacher's files, as facts for people and for JSON; nothing of them is executed.

`fewstep.teachers.formats` says which of these functions a kind of teacher has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.safe_pickle import SnapshotObject, read_snapshot
from fewstep.storage.bounded_reading import regular
from fewstep.storage.checkpoint import COUNTERS
from fewstep.storage.files import digest, read_folder, read_json
from fewstep.storage.model_folder import KIND
from fewstep.storage.safetensors_header import header
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import describe_network
from fewstep.teachers.snapshots import LICENCE, description

Facts = dict[str, Any]

_TYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}


def of_file(path: Path) -> Facts:
    """A snapshot, a training state or a safetensors file; ValueError where it is none of them."""
    with regular(path) as file:
        head = file.read(16)
    named = head[4:9] == b"\0\0\0\0{"  # whose first byte, of a length, can be a pickle's
    if not named and (head[:1] == b"\x80" or head[:2] == b"PK"):
        return _snapshot(path)
    if named or path.suffix == ".safetensors" or head[8:9] == b"{":
        whole = {"file": str(path), "bytes": path.stat().st_size, "sha256": digest(path)}
        return {"what": "safetensors file", **whole, **of_weights(path)}
    raise ValueError(f"{path} is no model file: neither a snapshot (.pkl, .pt) nor safetensors")


def of_weights(path: Path) -> Facts:
    """Number, size and types of tensors, and metadata, from the header of a safetensors file."""
    head = header(path)
    pairs = [(_type(kind), head.shapes[name]) for name, kind in head.types.items()]
    return {**_count(pairs), **({"metadata": dict(head.metadata)} if head.metadata else {})}


def of_model(path: Path) -> Facts:
    """A finished model or a checkpoint of fewstep, whose digests are compared.

    ValueError where a folder is neither, or is damaged.
    """
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


def of_pipeline(path: Path) -> Facts:
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


def _stored(path: Path, sha: str) -> Facts:
    """A file of a folder whose digest was checked."""
    facts = {"bytes": path.stat().st_size, "sha256": sha}
    return facts | of_weights(path) if path.suffix == ".safetensors" else facts


def _size(path: Path) -> Facts:
    return {"bytes": path.stat().st_size, **of_weights(path)}


def _type(name: str) -> str:
    """ "BF16" -> "bfloat16"."""
    letters = name.rstrip("0123456789")
    return _TYPES.get(letters, letters.lower()) + name[len(letters) :]


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
