"""Notes on pictures that were treated unasked: turned upright, passed over, frames dropped.

Each kind is counted and reported once.
"""

from __future__ import annotations

from heapq import nsmallest

from fewstep.data.errors import FEW

UPRIGHT = "turned upright as their EXIF orientation says"
UNREADABLE = "with EXIF data that cannot be read, taken as they are stored"
FRAMES = "with several frames, of which the first is taken"


class Notes:
    """Names by what happened to them; a picture that is read twice counts once."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}
        self.sentences: list[str] = []
        """What concerns the set as a whole."""

    def add(self, what: str, name: str) -> None:
        """`name` is one of those to which `what` happened, for instance `UPRIGHT`."""
        self.names.setdefault(what, set()).add(name)

    def forget(self, name: str) -> None:
        """Nothing happened to `name` after all."""
        for names in self.names.values():
            names.discard(name)

    def lines(self) -> list[str]:
        """A sentence for each kind: how many, and the first few by name."""
        lines = list(self.sentences)
        for what, names in self.names.items():
            if not names:
                continue
            more = f" and {len(names) - FEW:,} more" if len(names) > FEW else ""
            lines.append(f"{len(names):,} {what}: {', '.join(nsmallest(FEW, names))}{more}")
        return lines
