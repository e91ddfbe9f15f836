"""Rules on what a run measures of itself: keep the best model, stop early, notice spikes.

Rules are pure functions of a measurement and of their memory: lists of numbers by name, which are
a part of the training state, so that a continued run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from fewstep.eval.metric_table import metric

Memory = dict[str, list[float]]


@dataclass(frozen=True)
class Best:
    """Which evaluation was the best; with `patience`, a run ends when none is better."""

    metric: str = ""
    """A number of gauges.jsonl, such as diversity or quick.fd_digits; none: no best is kept."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether small or large numbers are good; auto: as the report's table marks a metric, and
    small ones of what has no mark."""
    patience: int = 0
    """Looks in a row, none of them better, after which the run ends; 0: it never does so."""

    def __post_init__(self) -> None:
        if self.patience < 0 or (self.patience and not self.metric):
            raise ValueError(f"Best needs patience >= 0, and a metric to be patient with: {self}")

    @property
    def sign(self) -> int:
        """1 where large numbers are good, else -1."""
        large = metric(self.metric).better == "higher"
        return 1 if self.mode == "max" or (self.mode == "auto" and large) else -1

    def judged(self, line: Mapping[str, Any], before: list[float], step: int) -> list[float]:
        """[best value, its step, evaluations since] after another one; [] before the first number.

        Arguments:
            line: what was measured, as in gauges.jsonl.
            before: the result of the evaluation before, [] at first.
            step: the training step.
        A value that is not finite never counts as better. Raises ValueError where `line` has no
        `metric`.
        """
        numbers = dict(_numbers(line))
        if self.metric not in numbers:
            raise ValueError(
                f"Run.best.metric is {self.metric!r}, but what this run looks at is "
                f"{', '.join(numbers)}"
            )
        value = numbers[self.metric]
        if math.isfinite(value) and (not before or self.sign * (value - before[0]) > 0):
            return [value, float(step), 0.0]
        return [*before[:2], before[2] + 1] if before else []

    def over(self, memory: Memory) -> bool:
        """Whether `patience` is exhausted, so that the run should end."""
        best = memory.get("best", [])
        return bool(self.patience) and bool(best) and best[2] >= self.patience


def _numbers(line: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a gauge, nested ones with dots in their names."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{key}.")
        elif isinstance(value, (int, float)) and key not in ("step", "images", "samples"):
            yield f"{before}{key}", float(value)


@dataclass(frozen=True)
class Spikes:
    """When a loss or gradient norm counts as a spike, and what is done.

    The usual values are the last `window` that were not far: far is more than `limit` times
    1.4826 median |v - m| from their median m; the factor makes it a standard deviation where
    values are normal.
    """

    limit: float = 8.0
    """Distance from the median that is far, in robust standard deviations; inf: nothing is."""
    steps: int = 20
    """Steps in a row that are far, which make a spike."""
    window: int = 200
    """Number of usual values whose median counts, 10 or more."""
    rollback: bool = False
    """Go back to the last checkpoint before the spike, and on with other samples; at most
    three times."""

    def __post_init__(self) -> None:
        if not self.limit > 0 or self.steps < 1 or self.window < 10:
            raise ValueError(f"Spikes need limit > 0, steps >= 1 and window >= 10, got {self}")

    def found(self, logs: Mapping[str, float], memory: Memory) -> list[str]:
        """Names of losses and norms that have just been far for `steps` steps; updates `memory`.

        After a spike the usual values are collected anew. Values that are not finite are ignored:
        their updates are skipped.
        """
        names: list[str] = []
        if math.isinf(self.limit):
            return names
        for name, value in logs.items():
            if not name.endswith(("/loss", "/grad_norm")) or not math.isfinite(value):
                continue
            usual = memory.setdefault(f"usual {name}", [])
            far = memory.setdefault(f"far {name}", [])
            if len(usual) == self.window and self._is_far(value, usual):
                far.append(value)
            else:
                usual.append(value)
                far.clear()
            if len(far) == self.steps:
                names.append(name)
                usual.clear()
                far.clear()
            del usual[: -self.window]
        return names

    @staticmethod
    def forget(net: str, memory: Memory) -> None:
        """What is usual of `net` is learned anew, as a new stage of it has begun."""
        for key in [key for key in memory if key.startswith((f"usual {net}/", f"far {net}/"))]:
            del memory[key]

    def _is_far(self, value: float, usual: list[float]) -> bool:
        middle = median(usual)
        spread = 1.4826 * median([abs(v - middle) for v in usual])
        return abs(value - middle) > self.limit * max(spread, 1e-3 * abs(middle))

    @staticmethod
    def alarm(memory: Memory) -> bool:
        """Whether any value is far at present."""
        return any(far for name, far in memory.items() if name.startswith("far "))
