"""How far a long preparation is: told to whoever listens, and to the watch over hanging ranks.

Encoding and checking data can take hours before the first step. What does it calls `progress`
now and then; a command line shows it, and may end it by raising from its listener. What was done
to the data unasked is a `remark`; where nobody listens it becomes a warning of Python's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from fewstep import parallel

Listener = Callable[[str, int, int], None]
"""What is done ("encoding prompts"), how many are finished, of how many; 0 of 0 while waiting."""
_listeners: list[Listener] = []
_hearers: list[Callable[[str], None]] = []


def progress(what: str = "", done: int = 0, total: int = 0) -> None:
    """Say that this process is at work on its data, and how far it is."""
    parallel.preparing()
    for listener in _listeners:
        listener(what, done, total)


def remark(lines: Iterable[str]) -> None:
    """Say what was done to the data unasked."""
    for line in lines:
        for hear in _hearers or [warnings.warn]:
            hear(line)


@contextmanager
def told(listener: Listener, hear: Callable[[str], None] = warnings.warn) -> Iterator[None]:
    """Within the block `listener` hears of progress, and `hear` of remarks, of each once."""
    heard: set[str] = set()

    def once(line: str) -> None:
        if line not in heard:
            heard.add(line)
            hear(line)

    _listeners.append(listener)
    _hearers.append(once)
    try:
        yield
    finally:
        _listeners.remove(listener)
        _hearers.remove(once)
