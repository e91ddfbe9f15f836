"""Collect everything that is wrong with a set of pictures into one error, by reason."""

from __future__ import annotations

FEW = 3
"""Offenders that are named for each reason."""


class Unfit(ValueError):
    """A picture that cannot be used; the message is the reason, `detail` its specifics."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


class Problems:
    """Counts offenders by reason and keeps the first few names, in bounded memory."""

    def __init__(self, origin: object) -> None:
        self.origin = origin
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """`name` cannot be used because it is `reason`, for instance "damaged"."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.first.setdefault(reason, [])
        if len(names) < FEW:
            names.append(f"{name} ({detail})" if detail else name)

    def refuse(self) -> None:
        """Raise one ValueError about everything that was added, if anything was."""
        if not self.counts:
            return
        parts = []
        for reason, count in self.counts.items():
            more = f" and {count - FEW:,} more" if count > FEW else ""
            parts.append(f"{count:,} {reason}: {', '.join(self.first[reason])}{more}")
        raise ValueError(f"{self.origin} cannot be used; {'; '.join(parts)}")
