"""How far a long preparation is, and what it meets: told to whoever listens.

Encoding and checking data can take hours before the first step. What does it calls `progress`
now and then; a command line shows it, and may end it by raising from its listener. What was done
to the data unasked is a `remark`; where nobody listens it becomes a warning of Python's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fewstep.training import distributed

Listener = Callable[[str, int, int], None]
"""What is done ("encoding prompts"), how many are finished, of how many; 0 of 0 while waiting."""
_listeners: list[Listener] = []
_hearers: list[Callable[[str], None]] = []


def report_progress(what: str = "", done: int = 0, total: int = 0) -> None:
    """Say that this process is at work on its data, and how far it is."""
    distributed.heartbeat_while_preparing()
    for listener in _listeners:
        listener(what, done, total)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Within the block `listener` hears of progress."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def remark(*lines: str) -> None:
    """Say what a person should know of the data, such as what was done to them unasked.

    Empty lines are passed over.
    """
    for line in filter(None, lines):
        for hear in _hearers or [warnings.warn]:
            hear(line)


@contextmanager
def heard(hear: Callable[[str], None]) -> Iterator[None]:
    """Within the block `hear` gets the remarks, each once."""
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
