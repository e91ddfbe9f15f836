"""How far a run has come, and how long it still takes at the pace of its last steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from fewstep.report.formatting import duration
from fewstep.report.run_data import RunData, number

RECENT = 30
"""Lines of the log that the pace is taken from."""
QUIET = 10
"""A run that has not logged for so many times its usual pause is said to be silent."""
PATIENCE = 60.0
"""Seconds it may be silent in any case."""


@dataclass(frozen=True)
class Progress:
    """The state of a run."""

    share: float
    """Of its steps that are done, from 0 to 1."""
    left: float
    """Seconds still to go; nan where it cannot be said."""
    text: str


def left(f: RunData) -> float:
    """Seconds until the last step at the pace of the last lines since the run was continued."""
    lines: list[tuple[float, float]] = []
    for line in f.log[-RECENT:]:
        step, at = number(line, "step"), number(line, "seconds")
        if lines and at < lines[-1][1]:
            lines = []
        lines.append((step, at))
    if len(lines) < 2 or not lines[-1][0] > lines[0][0]:
        return math.nan
    pace = (lines[-1][1] - lines[0][1]) / (lines[-1][0] - lines[0][0])
    return max(0, f.steps - f.done) * pace


def progress(f: RunData) -> Progress:
    """The state of a run, in numbers and words."""
    if f.finished:
        return Progress(1.0, 0.0, f"Finished: {f.done:,} steps.")
    share = min(1.0, f.done / f.steps) if f.steps else 0.0
    ahead = left(f)
    text = f"Step {f.done:,} of {f.steps:,} ({share:.0%})"
    text += f", about {duration(ahead)} left" if math.isfinite(ahead) else ""
    log = f.path / "log.jsonl"
    if log.is_file():
        pause, silent = _pause(f), time.time() - log.stat().st_mtime
        if silent > max(PATIENCE, QUIET * pause):
            text += f"; nothing new for {duration(silent)}: it may have stopped"
    return Progress(share, ahead, f"{text}.")


def _pause(f: RunData) -> float:
    """Seconds between two of the last lines."""
    times = [number(line, "seconds") for line in f.log[-2:]]
    return max(0.0, times[1] - times[0]) if len(times) == 2 else 0.0
