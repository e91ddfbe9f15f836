"""Progress for the user: a bar with the time left, or plain lines in a log file."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from fewstep.cli.output import quiet
from fewstep.signals import Stopped, last_words, leave_terminal, terminals

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY = 10.0
"""Seconds between two plain lines."""


class Bar:
    """Progress of one piece of work; a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.began = self.printed = time.perf_counter()
        self.start: int | None = None
        self.others: dict[str, Bar] = {}
        self.tasks: dict[str, TaskID] = {}
        self.rich: Progress | None = None
        if sys.stderr.isatty() and not silent():
            self.rich = _columns()
            self.task = self.rich.add_task(title, total=total, note="")

    def __enter__(self) -> Bar:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rich:
            self.rich.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished."""
        self.done = done
        if self.start is None:  # what was before is no work of this kind
            self.start, self.began = done, time.perf_counter()
        if self.rich:
            self.rich.update(self.task, completed=done, note=note)
            return
        now = time.perf_counter()
        if now - self.printed >= EVERY or done == self.total:
            self.printed = now
            left = ""
            if here := done - self.start:
                left = f", {(now - self.began) / here * (self.total - done):.0f} s left"
            say(f"{self.title}: {done}/{self.total}{left}  {note}".rstrip())

    def beside(self, what: str, done: int, total: int) -> None:
        """Show progress of a preliminary piece of work: `done` of `total`, still unfinished."""
        if self.rich is None:
            self.others.setdefault(what, Bar(what, total)).update(done)
            return
        if what not in self.tasks:
            self.tasks[what] = self.rich.add_task(what, total=total, note="")
        self.rich.update(self.tasks[what], completed=done)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.rich:
            self.rich.console.print(text, highlight=False, markup=False)
        else:
            say(text)


def _columns() -> Progress:
    """The bar of a terminal, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:>18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


def say(text: str) -> None:
    """Print a line for the user to standard error; results go to standard output."""
    if not silent():
        last_words(text)


def silent() -> bool:
    """Whether progress and notes are not wanted, or are told by another process."""
    return quiet() or not first()


def first() -> bool:
    """Whether this process is the only one, or rank 0 of several, which alone prints."""
    return os.environ.get("RANK", "0") == "0"


class Stop:
    """Whether the person, or the system, has asked to stop, and by which signal."""

    signal = 0

    @staticmethod
    def code(number: int) -> int:
        """130 after Ctrl-C; 75, "try again", after a signal of the system."""
        return 130 if number == signal.SIGINT else 75


@contextmanager
def stopping(launched: bool = False) -> Iterator[Stop]:
    """Within the block Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 only sets a flag; a second interrupts.

    A launcher repeats a terminal's Ctrl-C and kills by itself what does not stop, so that in
    `launched` processes a second signal changes nothing.
    """
    stop, screens = Stop(), terminals()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal(screens)
        if stop.signal and not launched:
            raise Stopped(number)
        if not stop.signal:
            stop.signal = number
            say("\nstopping after this step" + ("" if launched else "; once more to stop at once"))

    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup says to go on
        watched.append(signal.SIGHUP)
    old = {number: signal.signal(number, handle) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
