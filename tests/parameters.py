"""Parameters without repetitions, or with slow ones: the first of a class, three pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

Thing = TypeVar("Thing")
FAMILIES = ("sd", "sd3", "flux2")
"""A U-Net, and transformers of two generations."""


def once_a_class(things: Iterable[object]) -> list[Any]:
    """What is of a class that came before is marked slow."""
    seen: set[type] = set()
    found: list[Any] = []
    for thing in things:
        found.append(pytest.param(thing, marks=[pytest.mark.slow] * (type(thing) in seen)))
        seen.add(type(thing))
    return found


def firsts(things: Iterable[Thing]) -> list[Thing]:
    """The first of each class."""
    return list({type(thing): thing for thing in reversed(list(things))}.values())[::-1]


def families(kinds: Iterable[str]) -> list[Any]:
    """Names of pipelines; those that are not in `FAMILIES` are marked slow."""
    return [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FAMILIES)) for kind in kinds
    ]
