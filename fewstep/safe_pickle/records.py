"""Records that stand in for the objects of a snapshot: they hold data and run nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.safe_pickle.limits import Budget, require


class Global(NamedTuple):
    """A name of Python code, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Blob:
    """A bytes literal, as a view of the file."""

    view: memoryview


@dataclass(eq=False)
class PersistentObject:
    """An object of a class whose source travels with it; the source is kept as text, unread."""

    class_name: str
    source: str
    state: dict[Any, Any]

    @property
    def source_sha256(self) -> str:
        """SHA-256 of the source text, in hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()


@dataclass(eq=False)
class OpaqueModule:
    """A layer or container of torch.nn, by name; its contents are read, it is never made."""

    kind: Global
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DType:
    """A plain numeric type of numpy."""

    dtype: torch.dtype


@dataclass(eq=False)
class Array:
    """A numpy array; `value` is None until its contents have been read."""

    value: Tensor | None = None


class Storage:
    """The bytes under one or more tensors, copied once, when first asked for."""

    def __init__(self, dtype: torch.dtype, view: memoryview) -> None:
        self.dtype = dtype
        self.view = view
        self.numel = len(view) // dtype.itemsize
        self._base: Tensor | None = None

    def base(self, budget: Budget) -> Tensor:
        """All elements, one-dimensional."""
        if self._base is None:
            budget.copied(len(self.view))
            self._base = from_bytes(self.view, self.dtype)
        return self._base


def from_bytes(view: memoryview, dtype: torch.dtype) -> Tensor:
    """A one-dimensional tensor with its own copy of the bytes."""
    content = bytearray(view)
    if dtype == torch.bool:
        require(not content.translate(None, b"\0\1"), "a truth value is neither 0 nor 1")
    if not content:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype)


def geometry(shape: object, stride: object, offset: object) -> tuple[int, int]:
    """(number of elements, last element reached) of a tensor, all arguments checked."""
    require(type(shape) is tuple and type(stride) is tuple, "a tensor's shape is not a tuple")
    assert isinstance(shape, tuple)
    assert isinstance(stride, tuple)
    require(len(shape) == len(stride), "a tensor's shape and strides differ in length")
    require(len(shape) <= 8, "a tensor has more than eight dimensions")
    numbers = (*shape, *stride, offset)
    require(all(whole(n) and 0 <= n < 1 << 40 for n in numbers), "a tensor's shape is no shape")
    count, size, last = 1, 1, offset
    for length, step in zip(shape, stride, strict=True):
        count *= length
        size *= max(length, 1)
        last += max(length - 1, 0) * step
    require(size < 1 << 48, "a tensor's shape is too large")
    assert isinstance(last, int)
    return count, last


def whole(value: object) -> bool:
    """Whether `value` is an int and no bool."""
    return type(value) is int
