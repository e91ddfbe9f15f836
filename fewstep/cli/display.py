"""What a person sees while something runs: a bar with time left, or plain lines in a log file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 10.0
"""Seconds between two plain lines."""


class Bar:
    """Progress of one piece of work; a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.began = self.printed = time.perf_counter()
        self.start: int | None = None
        self.rich: Progress | None = None
        if sys.stderr.isatty():
            self.rich = Progress(
                TextColumn("{task.description:>18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.rich.add_task(title, total=total, note="")

    def __enter__(self) -> Bar:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich:
            self.rich.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished."""
        self.done = done
        if self.start is None:
            self.start = done - 1
        if self.rich:
            self.rich.update(self.task, completed=done, note=note)
            return
        now = time.perf_counter()
        if now - self.printed >= EVERY or done == self.total:
            self.printed = now
            here = max(1, done - self.start)
            left = (now - self.began) / here * (self.total - done)
            say(f"{self.title}: {done}/{self.total}, {left:.0f} s left  {note}".rstrip())

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.rich:
            self.rich.console.print(text, highlight=False)
        else:
            say(text)


def say(text: str) -> None:
    """A line for the person who waits, on standard error; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


class Stop:
    """Whether the person, or the system, has asked to stop, and by which signal."""

    signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def code(self) -> int:
        """130 after Ctrl-C; 75, "try again", after SIGTERM."""
        return 130 if self.signal == signal.SIGINT else 75


@contextmanager
def stopping() -> Iterator[Stop]:
    """Within the block the first Ctrl-C or SIGTERM only sets a flag; a second one interrupts."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.signal = number
        say("\nstopping after this step; once more to stop at once")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
