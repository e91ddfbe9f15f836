"""Weights and arrays that other projects publish as pickles, read as data like a snapshot.

Two kinds: a state dict as torch.save writes it, in an archive or in the older format where the
storages follow the pickle; and dictionaries of numpy arrays, such as the statistics of EDM2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.safe_pickle.allowed_names import STORAGES, Words
from fewstep.safe_pickle.limits import Budget, Limits, UnsafeSnapshotError, require
from fewstep.safe_pickle.records import Array, Global, Storage
from fewstep.safe_pickle.snapshot import content
from fewstep.safe_pickle.storages import (
    FORMAT,
    MAGIC,
    StorageWords,
    TensorArchive,
    check_identifier,
    words_of_pickle,
)
from fewstep.safe_pickle.virtual_machine import Machine, Vocabulary


class _StateWords(Words):
    """Tensors whose storages are elsewhere, in a dictionary that may carry module versions."""

    def __init__(self, budget: Budget, fetch: Callable[[Any], Storage]) -> None:
        super().__init__(budget, None, fetch)

    def fill(self, target: Any, state: Any) -> None:
        """As `Words.fill`; the module versions of a state dict are passed over."""
        versions = type(state) is dict and set(state) == {"_metadata"}
        if not (versions and type(target) is dict):
            super().fill(target, state)


class _Outline(_StateWords):
    """Which storages a pickle asks for, when their contents come only after it."""

    def __init__(self, budget: Budget) -> None:
        self.asked: dict[str, tuple[Any, ...]] = {}
        super().__init__(budget, self._note)

    def _note(self, pid: Any) -> Storage:
        check_identifier(pid)
        require(len(pid) == 5 or pid[5] is None, "a view of a storage")
        same = self.asked.setdefault(pid[2], pid)
        require(same[:5] == pid[:5], "a storage is described twice")
        return Storage(STORAGES[pid[1].name], memoryview(b""))

    def call(self, record: Global, args: tuple[Any, ...]) -> Any:
        """Only an OrderedDict is made; tensors are left out, as None."""
        return super().call(record, args) if record.name == "OrderedDict" else None


def read_state(path: Path, limits: Limits = Limits()) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote, by name, with their types and bits.

    Raises UnsafeSnapshotError, a ValueError, for anything else, and executes nothing.
    """
    return _named(path, lambda: parse_state(content(path, limits), limits))


def parse_state(data: bytes, limits: Limits = Limits()) -> dict[str, Tensor]:
    """`read_state` for the content of a file."""
    budget = Budget(limits, len(data))
    if data.startswith(b"PK"):
        archive = TensorArchive(data, budget)
        machine = Machine(
            archive.member("data.pkl"), 0, _StateWords(budget, archive.fetch), budget
        )
        tree = machine.run()
        require(machine.position == len(machine.data), "data after the end of the pickle")
    else:
        tree = _older(memoryview(data), budget)
    fits = type(tree) is dict and all(
        type(name) is str and isinstance(value, Tensor) for name, value in tree.items()
    )
    require(fits and bool(tree), "the file holds no dictionary of tensors")
    out: dict[str, Tensor] = tree
    return out


def _older(view: memoryview, budget: Budget) -> Any:
    """The object of a file in torch.save's format before 1.6.

    Four pickles (magic number, version, facts of the machine, the object), the list of storages,
    and for each its number of elements and its elements. The object is read twice: for what it
    asks, and once the storages are known.
    """
    require(bytes(view[:1]) == b"\x80", "neither a pickle nor an archive")
    position = 0

    def part(words: Vocabulary) -> Any:
        nonlocal position
        machine = Machine(view, position, words, budget)
        result = machine.run()
        position = machine.position
        return result

    magic, version, facts = (part(StorageWords()) for _ in range(3))
    numbers = type(magic) is int and type(version) is int
    require(numbers and (magic, version) == (MAGIC, FORMAT), "a file of another format")
    little = type(facts) is dict and facts.get("little_endian") is True
    require(little, "the file is not little-endian")
    start, outline = position, _Outline(budget)
    part(outline)
    keys = part(StorageWords())
    listed = type(keys) is list and all(type(key) is str for key in keys)
    require(listed and sorted(keys) == sorted(outline.asked), "the file lists other storages")
    storages: dict[str, Storage] = {}
    for key in keys:
        _, kind, _, _, count = outline.asked[key][:5]
        dtype = STORAGES[kind.name]
        end = position + 8 + count * dtype.itemsize
        require(end <= len(view), "the file ends within a storage")
        stored = struct.unpack("<q", view[position : position + 8])[0]
        require(stored == count, "a storage is not of the size it says")
        storages[key] = Storage(dtype, view[position + 8 : end])
        position = end
    require(position == len(view), "data after the last storage")
    return Machine(view, start, _StateWords(budget, lambda pid: storages[pid[2]]), budget).run()


def read_arrays(path: Path, limits: Limits = Limits()) -> dict[str, Any]:
    """Dictionaries of numbers and numpy arrays (as tensors), up to two deep, from a pickle.

    Raises UnsafeSnapshotError, a ValueError, for anything else, and executes nothing.
    """
    return _named(path, lambda: _arrays(content(path, limits), limits))


def _arrays(data: bytes, limits: Limits) -> dict[str, Any]:
    budget = Budget(limits, len(data))
    require(data[:1] == b"\x80", "not a pickle")
    machine = Machine(memoryview(data), 0, words_of_pickle(budget), budget)
    tree = machine.run()
    require(machine.position == len(data), "data after the end of the pickle")
    require(type(tree) is dict, "the file holds no dictionary")
    return {name: _plain(name, value, budget, depth=0) for name, value in tree.items()}


def _plain(name: Any, value: Any, budget: Budget, depth: int) -> Any:
    require(type(name) is str, "a name is not text")
    budget.spend("plain values", 1, budget.limits.values)
    if type(value) is Array and value.value is not None:
        return value.value
    if type(value) is dict and depth == 0:
        return {key: _plain(key, item, budget, depth + 1) for key, item in value.items()}
    require(type(value) in (int, float, str), f"{name[:80]!r} is neither numbers nor text")
    return value


def _named(path: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`read()`, whose refusal names the file."""
    try:
        return read()
    except UnsafeSnapshotError as error:
        text = str(error)
        raise UnsafeSnapshotError(text if str(path) in text else f"{path}: {text}") from None
