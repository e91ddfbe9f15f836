"""How far a long preparation is: told to whoever listens, and to the watch over hanging ranks.

Encoding and checking data can take hours before the first step. What does it calls `progress`
now and then; a command line shows it, and may end it by raising from its listener.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fewstep import parallel

Listener = Callable[[str, int, int], None]
"""What is done ("encoding prompts"), how many are finished, of how many; 0 of 0 while waiting."""
_listeners: list[Listener] = []


def progress(what: str = "", done: int = 0, total: int = 0) -> None:
    """Say that this process is at work on its data, and how far it is."""
    parallel.preparing()
    for listener in _listeners:
        listener(what, done, total)


@contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Within the block `listener` hears of progress."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
