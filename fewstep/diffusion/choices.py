"""Settings that are one of a few values: fields of a type such as Literal["mean", "sum"]."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from typing import Any


def require_choices(settings: Any) -> None:
    """ValueError where a field of a dataclass has none of the values that its Literal names."""
    for name, values in _choices(settings.__class__).items():
        value = getattr(settings, name)
        if value not in values:
            *others, last = map(repr, values)
            known = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{type(settings).__name__}.{name} is {known}, got {value!r}")


@lru_cache(maxsize=512)
def _choices(cls: type) -> Mapping[str, tuple[object, ...]]:
    """Field -> its values, of the fields whose type is a Literal.

    None of a class whose types have names that cannot be looked up, as in a function.
    """
    hints: dict[str, Any] = {}
    with suppress(NameError):
        hints = typing.get_type_hints(cls)
    kinds = {field.name: hints.get(field.name) for field in fields(cls)}
    return {
        name: typing.get_args(kind)
        for name, kind in kinds.items()
        if typing.get_origin(kind) is typing.Literal
    }
