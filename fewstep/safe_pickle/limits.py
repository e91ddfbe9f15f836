"""Limits on what reading a snapshot costs: operations, memory and nesting.

Every bound is far above what published snapshots need and far below what would hurt. Bytes are
bounded by the file's own size: an honest file hands out each of its bytes once.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class UnsafeSnapshotError(ValueError):
    """A snapshot that is malformed, over the limits, or asks for more than plain data."""


def require(condition: bool, message: str) -> None:
    """Refuse the file with `message` unless `condition` holds."""
    if not condition:
        raise UnsafeSnapshotError(message)


@dataclass(frozen=True)
class Limits:
    """Bounds for one file; a small network needs 20 thousand operations, the largest 100."""

    file_bytes: int = 16 << 30
    operations: int = 1_000_000
    containers: int = 300_000
    memo: int = 500_000
    text_bytes: int = 64 << 20
    """Memory of all strings together, beyond the file's size."""
    long_text: int = 4 << 20
    """A string longer than this must be Latin-1, as bytes written as text are."""
    integer_bytes: int = 32
    tensors: int = 100_000
    arrays: int = 1_000
    zip_members: int = 50_000
    modules: int = 100_000
    """Modules visited when names are joined; shared modules count each time."""
    depth: int = 64
    """Nesting of modules, and of plain values."""
    entries: int = 100
    """Entries of the file's own dictionary."""
    values: int = 10_000
    """Plain values in constructor arguments and the like."""
    name_length: int = 512
    spare: int = 1 << 20
    """Characters of names and plain text, and of source, that are returned beyond the file's size:
    one string can be referred to any number of times."""


@dataclass
class Budget:
    """What has been spent of `limits` so far."""

    limits: Limits
    file_bytes: int
    spent: dict[str, int] = field(default_factory=dict)

    def spend(self, what: str, amount: int, bound: int) -> None:
        """Count `amount` of `what`; refuse the file beyond `bound`."""
        total = self.spent.get(what, 0) + amount
        require(total <= bound, f"more than {bound} {what}")
        self.spent[what] = total

    def restart(self, what: str) -> Budget:
        """Set the amount spent on `what` to zero; returns the budget itself."""
        self.spent.pop(what, None)
        return self

    def told(self, what: str, text: str) -> None:
        """Count characters of text returned from the file, each time they are."""
        self.spend(f"characters of {what}", len(text), self.limits.spare + self.file_bytes)

    def copied(self, amount: int) -> None:
        """Count bytes returned as tensors and arrays."""
        self.spend("bytes of tensors", amount, self.file_bytes)
