"""Progress reporting for long data preparation.

Encoding and checking data can take hours before the first step. Such code calls `report_progress`
now and then; a command line shows it, and may stop the preparation by raising an exception from
its listener. `remark` reports what was done to the data unasked; without a hearer it becomes a
Python warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int], None]
"""What is done ("encoding prompts"), how many are finished, of how many; 0 of 0 while waiting."""
_listeners: list[Listener] = []
_hearers: list[Callable[[str], None]] = []


def report_progress(what: str = "", done: int = 0, total: int = 0) -> None:
    """Report that `done` of `total` items of `what` are finished; 0 of 0 while waiting.

    Calls every listener, and tells the watchdog of several processes that this one is alive.
    """
    from fewstep.training import distributed

    distributed.heartbeat_while_preparing()
    for listener in _listeners:
        listener(what, done, total)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Within the block, call `listener` at every progress report."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def remark(*lines: str) -> None:
    """Report what a person should know of the data, such as what was done to them unasked.

    Each line that is not empty goes to all hearers, or becomes a warning where there are none.
    """
    for line in filter(None, lines):
        for hear in _hearers or [warnings.warn]:
            hear(line)


@contextmanager
def heard(hear: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call `hear` with every remark, once for each different text."""
    before: set[str] = set()

    def once(line: str) -> None:
        if line not in before:
            before.add(line)
            hear(line)

    _hearers.append(once)
    try:
        yield
    finally:
        _hearers.remove(once)
