"""A fault that `mutants` plants."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`original`, found once in fewstep/`file`, becomes `replacement`; tests/`tests` must fail."""

    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]


def faults(file: str, tests: tuple[str, ...], *pairs: tuple[str, str]) -> tuple[Mutant, ...]:
    """Several faults of one file under the same tests."""
    return tuple(Mutant(file, original, replacement, tests) for original, replacement in pairs)
