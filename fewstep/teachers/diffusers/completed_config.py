"""Configurations of a part, completed as its class completes them.

A configuration file holds what was known when it was written. A key that is missing has the
default of the class that reads it, such as 0.18215 for the scaling factor of a VAE from before
that key, and one that the class does not know is passed over with a warning by diffusers. Here
numbers come from the completed configuration alone; a key that nobody knows and that says
something is refused, since what it says might matter, and one that says null is passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.teachers.diffusers.network import require_library


def completed(
    class_name: str,
    told: Mapping[str, Any],
    where: Path,
    older: Sequence[str] = (),
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """All arguments of the constructor of a class of diffusers, as it reads the dictionary `told`.

    older: classes whose keys may be there too, as names that published folders have for this one;
    more: keys that are no argument and are kept as they are.
    """
    cls = getattr(require_library("diffusers"), class_name)
    parameters = inspect.signature(cls.__init__).parameters
    known = {name: p.default for name, p in parameters.items() if name != "self"}
    try:
        given, left, _ = cls.extract_init_dict({**told, "_class_name": class_name})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is not the configuration of a {class_name}: {error}") from None
    passed = {key for name in older for key in _arguments(name)}
    strange = sorted(key for key in left.keys() - passed - set(more) if left[key] is not None)
    if strange:
        raise ValueError(
            f"{where} says {strange[0]!r}, which a {class_name} of the installed diffusers does "
            "not know; update diffusers, or remove the key if it has no meaning for the network"
        )
    kept = {key: told[key] for key in more if told.get(key) is not None}
    return {key: _listed(value) for key, value in {**known, **given, **kept}.items()}


def _listed(value: Any) -> Any:
    """A default as JSON would have it: lists in place of tuples."""
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


def _arguments(class_name: str) -> set[str]:
    """What the constructor of a class of diffusers takes."""
    cls = getattr(require_library("diffusers"), class_name)
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def number(config: Mapping[str, Any], key: str, where: object) -> float:
    """The finite number under `key`; ValueError names `where` it is not."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ValueError(f"{where}: {key} should be a number, got {value!r:.80}")
    return float(value)
