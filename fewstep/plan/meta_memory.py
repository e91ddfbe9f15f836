"""Tensors without numbers, and the account of the memory that they would take.

A tensor on torch's device "meta" has a shape and a type, and no values: a network of any size is
built and trained there in a moment, on any machine. `MetaMemory` sees every operation beneath
autograd, forward and backward. It enters the bytes of each new storage and strikes them out when
the storage is let go, so that what autograd saves, what optimisers keep and what is there for a
moment are all counted, when they are there. It counts the operations of products, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

META = torch.device("meta")
aten = torch.ops.aten


class MetaMemory(TorchDispatchMode):
    """Bytes of all storages on "meta" that were made within it and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.operations = 0
        """Floating-point operations of matrix products, convolutions and attention."""
        self._storages: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so costs time at each operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        if func is aten._to_copy.default and args[0].is_meta and _to_cpu(kwargs):
            return torch.ones(args[0].shape, dtype=args[0].dtype)  # numbers that are only shown
        with torch._C.DisableTorchFunction():  # which asks of a tensor would pass through
            out, operations = outcome(func, args, kwargs)
            self.operations += operations
            for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.is_meta:
                    self._enter(leaf)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a matrix product, a convolution or attention; else 0."""
    if func is FLASH.default:
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if func is FLASH_BACKWARD.default:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    known = flop_registry.get(func._overloadpacket)
    return 0 if known is None else int(known(*args, **kwargs, out_val=out))


def _to_cpu(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") == torch.device("cpu")


class _Shape(NamedTuple):
    """A tensor of its own storage, without it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        """The description of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def empty(self) -> Tensor:
        """A new tensor on "meta" of this description."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=META)


@dataclass(frozen=True)
class _Answer:
    """What an operation gives: new tensors, and None in the place of those not asked for."""

    kind: type
    """Tensor, or tuple or list of them."""
    parts: tuple[_Shape | None, ...]
    operations: int

    def new(self) -> Any:
        """Such an answer, of new tensors."""
        made = (None if part is None else part.empty() for part in self.parts)
        return next(made) if self.kind is Tensor else self.kind(made)


_outcomes: dict[Any, _Answer | None] = {}
"""What operations give, by operation and arguments: None where they have to be done."""


def outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """func(*args, **kwargs) and its operations, found once for all calls that are alike.

    On "meta" most operations find the shape of their answer by many others in Python, and a
    network repeats few kinds of them thousands of times. What changes an argument, or gives a
    view of one, is always done; but what only changes numbers, and gives nothing, has nothing to
    do where there are none: the steps of an optimiser on all its tensors.
    """
    if _is_silent(func) and _all_meta(args):
        return None, 0
    key = _key((func, args, kwargs)) if _is_fresh(func) else None
    known = None if key is None else _outcomes.get(key)
    if known is not None:
        return known.new(), known.operations
    out = func(*args, **kwargs)
    operations = _operations(func, args, kwargs, out)
    if key is not None and key not in _outcomes:
        _outcomes[key] = _described(out, args, operations)
    return out, operations


def _all_meta(args: tuple[Any, ...]) -> bool:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


def _described(out: Any, args: tuple[Any, ...], operations: int) -> _Answer | None:
    """The description of an answer, or None where new tensors of its shapes are not all of it."""
    kind = Tensor if isinstance(out, Tensor) else type(out)
    parts = (out,) if kind is Tensor else out
    if kind not in (Tensor, tuple, list):
        return None
    if not all(part is None or isinstance(part, Tensor) for part in parts):
        return None
    shapes = tuple(part if part is None else _Shape.of(part) for part in parts)
    made = [part for part in parts if part is not None]
    fresh = _own(tuple(made), args) and all(_same(part, _Shape.of(part)) for part in made)
    return _Answer(kind, shapes, operations) if fresh else None


@cache
def _is_silent(func: Any) -> bool:
    """Whether an operation gives nothing."""
    return not func._schema.returns


@cache
def _is_fresh(func: Any) -> bool:
    """Whether an operation says that it changes nothing and gives no views."""
    schema = func._schema
    return all(part.alias_info is None for part in (*schema.arguments, *schema.returns))


def _own(parts: tuple[Tensor, ...], args: tuple[Any, ...]) -> bool:
    """Whether each answer has a storage that is neither an argument's nor another's."""
    taken = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    every = [tensor.untyped_storage()._cdata for tensor in parts]
    return len({*every}) == len(every) and not {*every} & {
        tensor.untyped_storage()._cdata for tensor in taken
    }


def _same(part: Tensor, shape: _Shape) -> bool:
    """Whether a new tensor of that shape is all that an answer is."""
    new = shape.empty()
    size = part.untyped_storage().nbytes()
    return part.is_meta and size == new.untyped_storage().nbytes() and not part.storage_offset()


def _key(value: Any) -> Any:
    """What tells calls apart that give different shapes, or None where that is not known."""
    if isinstance(value, Tensor):
        plain = value.is_meta and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
        whole = plain and not value.is_neg() and not value.is_conj()
        return _Shape.of(value) if whole else None
    if isinstance(value, (tuple, list)):
        parts = []
        for item in value:
            part = _key(item)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)
    if isinstance(value, dict):
        return _key([*value.items()])
    if value is None:
        return "None"
    return (type(value), value) if isinstance(value, Hashable) else None


FLASH = aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


class AsOnDevice(TorchFunctionMode):
    """What a device does that "meta" does not: attention without the N x N matrix, and autocast.

    lower: the type of products under autocast, None without; wide: whether normalisations stay in
    float32 there, as on an accelerator, but not on a CPU. As autocast does, a weight that is
    trained is cast once.
    """

    def __init__(self, lower: torch.dtype | None, wide: bool) -> None:
        super().__init__()
        self.lower, self.wide = lower, wide
        self._casts: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._held: list[Tensor] | None = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0])
        if self.lower is not None and func in PRODUCTS:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        elif self.lower is not None and self.wide and func in NORMS:
            args = tuple(_wide(a) for a in args)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """What loss.backward() does, with this mode at work in what is computed again."""
        start, self._held = torch.ones_like(loss), None
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        self._held = []

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype is self.lower:
            return value
        if not value.is_floating_point():
            return value
        if not (value.requires_grad and value.is_leaf):
            return value.to(self.lower)
        cast = self._casts.get(id(value))
        if cast is None or not cast.requires_grad:
            cast = self._casts[id(value)] = value.to(self.lower)
            if self._held is not None:  # autocast holds them until it ends
                self._held.append(cast)
        return cast


PRODUCTS = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.einsum),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.__matmul__),
        *(Tensor.matmul, Tensor.bmm, F.scaled_dot_product_attention),
    }
)
"""What autocast computes in the lower type."""
NORMS = frozenset(
    {
        *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.layer_norm),
        *(torch.group_norm, torch.rms_norm, torch.softmax, Tensor.softmax, Tensor.norm),
    }
)
"""What an accelerator's autocast computes in float32."""


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """By the fused kernel, which keeps q, k, v, the answer and one number for each query."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    options = {"attn_mask": attn_mask, "scale": scale}
    out: Tensor = FLASH(query, key, value, dropout_p, is_causal, **options)[0]
    return out
