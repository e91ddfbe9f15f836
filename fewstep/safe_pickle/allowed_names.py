"""The names that snapshots use, and the data each stands for.

A network snapshot of EDM or EDM2 is one pickle. Its modules are calls of
`torch_utils.persistence._reconstruct_persistent_obj` on a dictionary of class name, source and
attributes; tensors are `torch._utils._rebuild_tensor_v2` of a storage and a geometry; storages
are `torch.storage._load_from_bytes` of a nested file (see `storage`). A training state is an
archive whose pickle names its storages from outside instead. Numbers of numpy, ordered and
attribute dictionaries, and containers of torch.nn complete the list; anything else is refused by
name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.safe_pickle.limits import Budget, UnsafeSnapshotError, require
from fewstep.safe_pickle.records import (
    Array,
    Blob,
    DType,
    Global,
    OpaqueModule,
    PersistentObject,
    Storage,
    from_bytes,
    geometry,
    whole,
)
from fewstep.safe_pickle.virtual_machine import key_of

Args = tuple[Any, ...]

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMBERS = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
}
MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("activation", "container", "conv", "dropout", "linear", "normalization")
}
DICTIONARIES = {("collections", "OrderedDict"), ("dnnlib.util", "EasyDict")}


class Words:
    """The vocabulary of a snapshot's main pickle."""

    def __init__(
        self,
        budget: Budget,
        load: Callable[[memoryview], Storage] | None,
        fetch: Callable[[Any], Storage] | None,
    ) -> None:
        self.budget = budget
        self.load = load
        """Reads a nested storage file; None where there are none."""
        self.fetch = fetch
        """Finds a storage by persistent identifier; None where there are none."""

    def name(self, record: Global) -> None:
        """UnsafeSnapshotError unless a pickle may use this name."""
        known = record in _CALLS or record in DICTIONARIES or record == ("numpy", "ndarray")
        storage = record.module == "torch" and record.name in STORAGES
        layer = record.module in MODULES and record.name.isidentifier()
        require(known or storage or layer, f"the name {str(record)[:200]!a} is not allowed")

    def call(self, record: Global, args: Args) -> Any:
        """The result of a call of `record`, of the few that have one; UnsafeSnapshotError else."""
        if record not in _CALLS:
            raise UnsafeSnapshotError(f"{record} may not be called")
        return _CALLS[record](self, args)

    def new(self, record: Global, args: Args) -> Any:
        """The stand-in for an object that is made without arguments: a dictionary or a layer."""
        require(args == (), f"{record} is made with arguments")
        if record in DICTIONARIES:
            return {}
        require(record.module in MODULES, f"{record} may not be made")
        return OpaqueModule(record)

    def fill(self, target: Any, state: Any) -> None:
        """Give a stand-in its state: of a layer, a numpy type or array, or an empty dictionary."""
        if type(target) is OpaqueModule and type(state) is dict:
            target.state = state
        elif type(target) is DType and type(state) is tuple:
            little = len(state) > 1 and type(state[1]) is str and state[1] in ("<", "|", "=")
            require(little, "an array is not little-endian")
        elif type(target) is Array and type(state) is tuple:
            require(len(state) == 5, "an array's contents are not five")
            self.fill_array(target, state[4], state[2], state[1], bool(state[3]))
        else:
            empty = type(target) is dict and type(state) is dict and not state
            require(empty, f"contents for a {type(target).__name__}")

    def fill_array(self, target: Array, blob: Any, kind: Any, shape: Any, fortran: bool) -> None:
        """Set the contents of a numpy array, in C or Fortran order."""
        require(type(blob) is Blob and type(kind) is DType, "an array holds no plain numbers")
        require(type(shape) is tuple, "an array's shape is not a tuple")
        count, _ = geometry(shape, (0,) * len(shape), 0)
        require(count * kind.dtype.itemsize == len(blob.view), "an array's size is not its shape")
        self.budget.spend("arrays", 1, self.budget.limits.arrays)
        self.budget.copied(len(blob.view))
        flat = from_bytes(blob.view, kind.dtype)
        turned = flat.reshape(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
        target.value = turned if fortran else flat.reshape(shape)

    def persistent(self, pid: Any) -> Any:
        """The storage of a persistent identifier; UnsafeSnapshotError where there are none."""
        if self.fetch is None:
            raise UnsafeSnapshotError("a persistent identifier in a file without storages")
        return self.fetch(pid)


def _persistent_object(words: Words, args: Args) -> PersistentObject:
    require(len(args) == 1 and type(args[0]) is dict, "a persistent object without description")
    meta = args[0]
    fields = {"type", "version", "module_src", "class_name", "state"}
    require(set(meta) == fields, "a persistent object has other fields than five")
    known = type(meta["type"]) is str and meta["type"] == "class" and whole(meta["version"])
    require(known and meta["version"] == 6, "a persistent object of another version than 6")
    name, source, state = meta["class_name"], meta["module_src"], meta["state"]
    require(type(name) is str and name.isidentifier(), "a class name is no name")
    require(len(name) <= words.budget.limits.name_length, "a class name is too long")
    require(type(source) is str and type(state) is dict, "a persistent object without contents")
    return PersistentObject(name, source, state)


def _pairs(words: Words, args: Args) -> dict[Any, Any]:
    require(len(args) <= 1 and all(type(a) is list for a in args), "a dictionary of no list")
    pairs = args[0] if args else []
    fit = all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs)
    require(fit, "a dictionary of no pairs")
    words.budget.spend("operations", len(pairs), words.budget.limits.operations)
    return {key_of(key): value for key, value in pairs}


def _set(words: Words, args: Args) -> set[Any]:
    require(len(args) <= 1 and all(type(a) is list for a in args), "a set of no list")
    items = args[0] if args else []
    words.budget.spend("operations", len(items), words.budget.limits.operations)
    return {key_of(item) for item in items}


def _bytes(words: Words, args: Args) -> Blob:
    latin = len(args) == 2 and type(args[0]) is str and type(args[1]) is str
    require(latin and args[1] == "latin1", "text is not bytes written as Latin-1")
    words.budget.spend("bytes as text", len(args[0]), words.budget.file_bytes)
    try:
        return Blob(memoryview(args[0].encode("latin-1")))
    except UnicodeEncodeError:
        raise UnsafeSnapshotError("text is not bytes written as Latin-1") from None


def _storage(words: Words, args: Args) -> Storage:
    require(len(args) == 1 and type(args[0]) is Blob, "a storage without bytes")
    if words.load is None:
        raise UnsafeSnapshotError("a storage inside a pickle that keeps them outside")
    return words.load(args[0].view)


def _tensor(words: Words, args: Args) -> Tensor:
    require(4 <= len(args) <= 7 and type(args[0]) is Storage, "a tensor without storage")
    storage, offset, shape, stride = args[:4]
    plain = all(a is None or (type(a) is dict and not a) for a in args[5:])
    require(plain, "a tensor with hooks or extras")
    count, last = geometry(shape, stride, offset)
    require(count == 0 or last < storage.numel, "a tensor reaches beyond its storage")
    require(count <= storage.numel, "a tensor repeats its storage")
    words.budget.spend("tensors", 1, words.budget.limits.tensors)
    if count == 0:
        return torch.empty(shape, dtype=storage.dtype)
    out: Tensor = storage.base(words.budget).as_strided(shape, stride, offset)
    return out


def _parameter(words: Words, args: Args) -> Tensor:
    require(len(args) == 3 and isinstance(args[0], Tensor), "a parameter without tensor")
    out: Tensor = args[0]
    return out


def _dtype(words: Words, args: Args) -> DType:
    require(len(args) >= 1 and type(args[0]) is str, "a numpy type without name")
    name = args[0].lstrip("<|=")
    require(name in NUMBERS, "a numpy type is no plain number")
    return DType(NUMBERS[name])


def _scalar(words: Words, args: Args) -> int | float | bool:
    plain = len(args) == 2 and type(args[0]) is DType and type(args[1]) is Blob
    require(plain and len(args[1].view) == args[0].dtype.itemsize, "a numpy number is not plain")
    value: int | float | bool = from_bytes(args[1].view, args[0].dtype)[0].item()
    return value


def _array(words: Words, args: Args) -> Array:
    return Array()


def _array_from_buffer(words: Words, args: Args) -> Array:
    require(len(args) == 4 and type(args[3]) is str, "an array is not of four parts")
    array = Array()
    words.fill_array(array, args[0], args[1], args[2], args[3] == "F")
    return array


_CALLS: dict[tuple[str, str], Callable[[Words, Args], Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("collections", "OrderedDict"): _pairs,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _bytes,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
}
