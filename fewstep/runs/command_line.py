"""Command lines as a person would type them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

SPECIAL = set('"$`\\!')
"""What double quotes do not protect."""


def command_line(words: Iterable[str]) -> str:
    """The words as one line for a shell, "Prompts('x.txt')" in double quotes."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not SPECIAL & set(word) else shlex.quote(word)
