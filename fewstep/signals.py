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


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported at this place."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of signals: ends what runs by raising `Stopped`, by way of its clean-ups.

    While a module is imported the process ends on the spot, since extensions turn what is raised
    there into errors of their own; what is half-written then has a name of its own.
    """
    if _importing(frame):
        os._exit(ended(Stopped(number)))
    raise Stopped(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, unless they are ignored.

    In a thread of another program nothing is changed: its signals are its own.
    """
    main = threading.current_thread() is threading.main_thread()
    old = {number: signal.getsignal(number) for number in STOPPING if main}
    old = {n: handler for n, handler in old.items() if handler != signal.SIG_IGN}
    for number in old:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ended(stop: KeyboardInterrupt) -> int:
    """Say that the command was stopped; the conventional exit code."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    last_words(f"\nfewstep: stopped{name}; run the same command again to continue")
    return 128 + number


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
