"""Checks of published constructor arguments and weights: valid, or refused.

A snapshot is somebody else's file. Its constructor arguments are accepted only where this package
knows the name and the value is of a sensible kind and size; its tensors only where names, shapes
and finiteness are exactly those of the network the arguments describe. A refusal is one sentence,
raised before anything large is computed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _whole(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return f"a whole number from {low} to {high}", fits


def _real(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and low <= value <= high

    return f"a number from {low:g} to {high:g}", fits


def _many(
    kind: tuple[str, Callable[[Any], bool]], low: int, high: int
) -> tuple[str, Callable[[Any], bool]]:
    words, fits = kind

    def all_fit(value: Any) -> bool:
        return (
            isinstance(value, list | tuple) and low <= len(value) <= high and all(map(fits, value))
        )

    return f"a list of {low} to {high}, each {words}", all_fit


def _or_none(kind: tuple[str, Callable[[Any], bool]]) -> tuple[str, Callable[[Any], bool]]:
    words, fits = kind
    return f"None or {words}", lambda value: value is None or fits(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


_SHARE = _real(0, 1)
_MULTIPLE = _whole(1, 256)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "img_resolution": _whole(1, 16384),
    "img_channels": _whole(1, 1024),
    "label_dim": _whole(0, 1_000_000),
    "augment_dim": _whole(0, 1024),
    "model_channels": _whole(1, 16384),
    "logvar_channels": _whole(1, 16384),
    "channels_per_head": _whole(1, 16384),
    "channel_mult": _many(_MULTIPLE, 1, 14),
    "channel_mult_emb": _or_none(_MULTIPLE),
    "channel_mult_noise": _or_none(_MULTIPLE),
    "num_blocks": _whole(0, 32),
    "attn_resolutions": _many(_whole(0, 16384), 0, 32),
    "resample_filter": _many(_real(-1e3, 1e3), 1, 16),
    "use_fp16": ("True or False", lambda value: isinstance(value, bool)),
    "model_type": ("a class name", _text),
    "embedding_type": ("a name", _text),
    "encoder_type": ("a name", _text),
    "decoder_type": ("a name", _text),
    "dropout": _SHARE,
    "label_dropout": _SHARE,
    "label_balance": _SHARE,
    "concat_balance": _SHARE,
    "res_balance": _SHARE,
    "attn_balance": _SHARE,
    "clip_act": _or_none(_real(0, 1e9)),
    "M": _whole(2, 100_000),
}
_ANY_NUMBER = _real(0, math.inf)


def check_arguments(
    owner: str, kwargs: Mapping[str, Any], known: Collection[str], required: Collection[str]
) -> None:
    """ValueError for arguments of `owner` that are unknown, missing or of the wrong kind."""
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
            raise ValueError(f"{owner} has no argument {name!r}{hint}")
    lacking = [name for name in required if name not in kwargs]
    if lacking:
        raise ValueError(f"{owner} needs the argument {lacking[0]!r}")
    for name, value in kwargs.items():
        words, fits = _KINDS.get(name, _ANY_NUMBER)
        if not fits(value):
            raise ValueError(f"{owner}: {name} should be {words}, got {str(value)[:80]!r}")


def load_state(net: nn.Module, state: Mapping[str, Tensor], owner: str) -> None:
    """Fill `net`, which may be on the meta device, with float32 copies of `state`.

    Raises ValueError for names that are missing or too many, for other shapes, and for tensors
    that are not finite floating-point numbers.
    """
    expected = net.state_dict()
    _same_names(owner, expected, state)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{owner}: {name} is not a dense tensor with values")
        if tensor.shape != expected[name].shape:
            shape, expected_shape = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{owner}: {name} has shape {shape}, expected {expected_shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{owner}: {name} holds {tensor.dtype}, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{owner}: {name} holds values that are not finite")
    copies = {
        name: tensor.detach().to(torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
    net.load_state_dict(copies, assign=True)


def _same_names(owner: str, expected: Collection[str], names: Collection[str]) -> None:
    missing = [name for name in expected if name not in names]
    extra = [str(name) for name in names if name not in expected]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({', '.join(missing[:3])}{_more(missing)})")
    if extra:
        parts.append(f"{len(extra)} unexpected ({', '.join(extra[:3])}{_more(extra)})")
    if parts:
        raise ValueError(f"{owner}: the state does not fit the arguments: {' and '.join(parts)}")


def _more(names: list[str]) -> str:
    return ", ..." if len(names) > 3 else ""
