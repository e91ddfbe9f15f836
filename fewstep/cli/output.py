"""What a verb prints, and where: its result on standard output, everything else on standard error.

Every verb has two flags, which are read here and nowhere else:

    --json    the result as one JSON value on standard output, and nothing beside it there
    --quiet   no progress and no notes; errors and results stay

A verb hands its result over once, as data and as text, and does not know which is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

_asked: set[str] = set()
"""Which of the flags the present command was given."""


class _Ask(argparse.Action):
    """Note the flag for the rest of the command."""

    def __call__(self, *given: Any) -> None:
        _asked.add(self.dest)


def begin() -> None:
    """Forget the flags of an earlier command of this process."""
    _asked.clear()


def output_flags(parser: argparse.ArgumentParser) -> None:
    """Add --json and --quiet."""
    group = parser.add_argument_group("output")
    for flag, text in (
        ("--json", "print the result as JSON, for machines"),
        ("--quiet", "print no progress and no notes: errors and the result alone"),
    ):
        group.add_argument(flag, nargs=0, action=_Ask, default=argparse.SUPPRESS, help=text)


def as_json() -> bool:
    """Whether the result is to be JSON."""
    return "json" in _asked


def quiet() -> bool:
    """Whether nothing but the result and errors is to be printed."""
    return "quiet" in _asked


def result(value: Any, text: str | None = None) -> None:
    """Print the result of a verb.

    Arguments:
        value: as JSON: dicts, lists, texts, numbers, None; a number that is not finite becomes
            None, since JSON has none, and anything else its text.
        text: for people; None: nothing, where the notes have said all of it.
    """
    if as_json():
        print(json.dumps(_plain(value), indent=2, allow_nan=False), flush=True)
    elif text is not None:
        print(text, flush=True)


def _plain(value: Any) -> Any:
    """`value` of what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(child) for child in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
