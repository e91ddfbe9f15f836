"""A snapshot file as data: which objects it holds, their arguments and their tensors."""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fewstep.safe_pickle.limits import Budget, Limits, UnsafeSnapshotError, require
from fewstep.safe_pickle.records import Array, OpaqueModule, PersistentObject
from fewstep.safe_pickle.storages import TensorArchive, words_of_archive, words_of_pickle
from fewstep.safe_pickle.virtual_machine import Machine


@dataclass(frozen=True)
class SnapshotObject:
    """One persistent object of a snapshot."""

    class_name: str
    init_args: tuple[Any, ...]
    """Positional constructor arguments: None, bool, int, float, str, lists and dicts of these."""
    init_kwargs: Mapping[str, Any]
    state: Mapping[str, Tensor]
    """What `state_dict()` would return, in its order; empty for objects that are no networks."""
    arrays: Mapping[str, Tensor]
    """The object's own numpy arrays."""
    source_sha256: str
    """Digest of the Python source that came with the class."""
    source: str = field(repr=False)
    """That source, as text. It was not executed and should not be."""


@dataclass(frozen=True)
class Snapshot:
    """All that `read_snapshot` takes from a file."""

    objects: Mapping[str, SnapshotObject]
    """By the name under which the file holds them: "ema", "net", "augment_pipe", ..."""
    settings: Mapping[str, Any]
    """The file's plain values, such as "dataset_kwargs"."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Loose dictionaries of tensors by name, such as a state dict."""
    left: tuple[str, ...]
    """Names of entries of other kinds, such as optimiser states."""
    kind: Literal["pickle", "archive"]
    sha256: str
    """Digest of the file."""
    size: int
    """Bytes."""


def read_snapshot(path: str | Path, limits: Limits = Limits()) -> Snapshot:
    """Read a network snapshot (.pkl) or training state (.pt) of EDM, EDM2, SiD or SiDA.

    Tensors keep their types and bits. Raises UnsafeSnapshotError, a ValueError, for anything
    that is not such a file, and never executes, imports or calls what a file names. Memory stays
    within a small multiple of the file's size.
    """
    data = content(Path(path), limits)
    try:
        return parse_snapshot(data, limits)
    except UnsafeSnapshotError as error:
        raise UnsafeSnapshotError(f"{path}: {error}") from None


def parse_snapshot(data: bytes, limits: Limits = Limits()) -> Snapshot:
    """`read_snapshot` for the content of a file."""
    budget = Budget(limits, len(data))
    kind, tree = _tree(data, budget)
    return _snapshot(kind, tree, hashlib.sha256(data).hexdigest(), budget)


def content(path: Path, limits: Limits) -> bytes:
    """The whole of a regular file; a copy in memory cannot change or shrink while it is read."""
    try:
        facts = path.stat()
        regular = stat.S_ISREG(facts.st_mode) and 0 < facts.st_size <= limits.file_bytes
        with path.open("rb") if regular else io.BytesIO() as file:
            data = file.read(facts.st_size)
    except (OSError, ValueError) as error:
        raise UnsafeSnapshotError(f"{path} cannot be read ({error})") from None
    require(bool(data), f"{path} is empty, too large, or not a regular file")
    return data


def _tree(data: bytes, budget: Budget) -> tuple[Literal["pickle", "archive"], Any]:
    """The object in the file, of records and plain values."""
    if data.startswith(b"PK"):
        archive = TensorArchive(data, budget)
        machine = Machine(archive.member("data.pkl"), 0, words_of_archive(archive), budget)
    else:
        require(data[:1] == b"\x80", "neither a pickle nor an archive")
        machine = Machine(memoryview(data), 0, words_of_pickle(budget), budget)
    tree = machine.run()
    require(machine.position == len(machine.data), "data after the end of the pickle")
    return "archive" if data.startswith(b"PK") else "pickle", tree


def _snapshot(
    kind: Literal["pickle", "archive"], tree: Any, sha256: str, budget: Budget
) -> Snapshot:
    require(type(tree) is dict, "the file holds no dictionary of objects")
    require(len(tree) <= budget.limits.entries, f"the file holds {len(tree)} entries")
    objects: dict[str, SnapshotObject] = {}
    settings: dict[str, Any] = {}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    left: list[str] = []
    for name, value in tree.items():
        require(_is_name(name, budget), "an entry's name is not text")
        if type(value) is PersistentObject:
            objects[name] = _found(value, budget)
        elif type(value) is dict and value and all(isinstance(v, Tensor) for v in value.values()):
            require(all(_is_name(key, budget) for key in value), "a tensor's name is not text")
            tensors[name] = value
        else:
            try:
                settings[name] = plain(value, budget.restart("plain values"))
            except UnsafeSnapshotError:
                left.append(name)
    return Snapshot(objects, settings, tensors, tuple(left), kind, sha256, budget.file_bytes)


def _is_name(value: Any, budget: Budget) -> bool:
    return type(value) is str and len(value) <= budget.limits.name_length


def _found(record: PersistentObject, budget: Budget) -> SnapshotObject:
    kwargs = plain(record.state.get("_init_kwargs", {}), budget.restart("plain values"))
    args = plain(record.state.get("_init_args", []), budget)
    require(type(kwargs) is dict and type(args) is list, f"{record.class_name} has no arguments")
    arrays = {}
    for name, value in record.state.items():
        if type(value) is Array and value.value is not None and _is_name(name, budget):
            arrays[name] = value.value
    budget.told("source", record.source)
    is_module = "_parameters" in record.state
    state = state_dict(record, budget) if is_module else {}
    return SnapshotObject(
        record.class_name, tuple(args), kwargs, state, arrays, record.source_sha256, record.source
    )


def plain(value: Any, budget: Budget, depth: int = 0) -> Any:
    """A copy of plain values; tuples become lists. Refuses records, tensors, cycles and bulk."""
    budget.spend("plain values", 1, budget.limits.values)
    require(depth < budget.limits.depth, "plain values are nested too deep")
    if type(value) is str:
        budget.told("plain text", value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [plain(item, budget, depth + 1) for item in value]
    require(type(value) is dict, f"a {type(value).__name__} among plain values")
    for key in value:
        require(_is_name(key, budget), "a plain value's name is not text")
        budget.told("plain text", key)
    return {key: plain(item, budget, depth + 1) for key, item in value.items()}


def state_dict(record: PersistentObject | OpaqueModule, budget: Budget) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as nn.Module.state_dict() orders them."""
    result: dict[str, Tensor] = {}

    def visit(module: Any, prefix: str, depth: int) -> None:
        budget.spend("modules", 1, budget.limits.modules)
        require(len(prefix) <= budget.limits.name_length, "a module's name is too long")
        known = type(module) in (PersistentObject, OpaqueModule)
        require(known, f"{prefix[:80]!r} is not a module")
        require(depth < budget.limits.depth, "modules nest too deep, or for ever")
        skipped = module.state.get("_non_persistent_buffers_set")
        skipped = skipped if type(skipped) is set else set()
        for name, tensor in _entries(module, "_parameters", prefix, budget):
            result[prefix + name] = _tensor(tensor, prefix + name)
        for name, tensor in _entries(module, "_buffers", prefix, budget):
            if name not in skipped:
                result[prefix + name] = _tensor(tensor, prefix + name)
        for name, child in _entries(module, "_modules", prefix, budget):
            visit(child, f"{prefix}{name}.", depth + 1)

    visit(record, "", 0)
    return result


def _entries(module: Any, kind: str, prefix: str, budget: Budget) -> list[tuple[str, Any]]:
    """What the module named `prefix` holds of a kind, without the empty places."""
    entries = module.state.get(kind, {})
    require(type(entries) is dict, f"{kind} is not a dictionary")
    budget.spend("parameters", len(entries), budget.limits.modules)
    fits = all(_is_name(name, budget) and "." not in name for name in entries)
    require(fits, f"a name in {kind} is no name")
    for name in entries:
        budget.told("names", prefix + name)
    return [(name, value) for name, value in entries.items() if value is not None]


def _tensor(value: Any, name: str) -> Tensor:
    require(isinstance(value, Tensor), f"{name[:80]!r} is not a tensor")
    assert isinstance(value, Tensor)
    return value
