"""How far a long preparation is, and what it meets: told to whoever listens.

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

Hearer = Callable[[str], None]
_hearers: list[Hearer] = []


def remark(text: str) -> None:
    """Say something that a person should know of the data, once; nothing where it is empty."""
    for hearer in _hearers if text else ():
        hearer(text)


@contextmanager
def heard(hearer: Hearer) -> Iterator[None]:
    """Within the block `hearer` gets the remarks."""
    _hearers.append(hearer)
    try:
        yield
    finally:
        _hearers.remove(hearer)


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
