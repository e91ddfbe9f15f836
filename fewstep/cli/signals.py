"""Signals and streams of a command: one line and the usual code, whatever comes and whenever."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal has come that ends the command; `number` says which."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """A handler: ends what runs, by way of its clean-ups."""
    raise Stopped(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, unless they are ignored.

    In a thread of another program nothing is changed: its signals are its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {n: signal.getsignal(n) for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    for number in old:
        signal.signal(number, raise_stopped)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def last_words(text: str) -> None:
    """A line on standard error, if that is still there."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def leave_terminal(terminals: list[int]) -> None:
    """After a hang-up: what is written to a terminal from now on goes nowhere, without error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)


def terminals() -> list[int]:
    """Those of the standard streams that are a terminal."""
    return [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]


def _as_it_is(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes of a file's name as they were; an escape for what the terminal has no letter for."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    parts = [
        bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else c.encode("ascii", ESCAPED)
        for c in letters
    ]
    return b"".join(parts), error.end


ESCAPED = "backslashreplace"


def tolerant() -> None:
    """Let standard output and error take any text: a terminal of ASCII ends nothing.

    A path of bytes that are not UTF-8 comes out as these bytes, for the next command to take.
    """
    codecs.register_error("fewstep", _as_it_is)
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="fewstep")
