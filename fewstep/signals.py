"""Signals and standard streams of a command: it ends with one line and the usual exit code."""

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
    """A signal ended the command; `number` is that of the signal."""

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
    """A signal handler that raises `Stopped`, so that clean-ups run.

    While a module is imported the process ends on the spot, since extensions turn exceptions
    there into errors of their own; what is half-written then has a name of its own.
    """
    if _importing(frame):
        os._exit(ended(Stopped(number)))
    raise Stopped(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, unless they are ignored.

    Outside the main thread nothing is changed.
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
    """Print that the command was stopped; returns the conventional exit code, 128 + signal."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    last_words(f"\nfewstep: stopped{name}; run the same command again to continue")
    return 128 + number


def last_words(text: str) -> None:
    """Print a line on standard error, if that can still be written to."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def leave_terminal(terminals: list[int]) -> None:
    """After a hang-up: send what is written to these descriptors to the null device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)


def terminals() -> list[int]:
    """The descriptors of the standard streams that are a terminal."""
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
    """Let standard output and error take any text, whatever the terminal's encoding.

    A path of bytes that are not UTF-8 is written as these bytes, so that the next command can read
    it. A stream that was closed (>&-) becomes the null device: what is printed to none of them
    goes to standard output instead.
    """
    codecs.register_error("fewstep", _as_it_is)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="fewstep")
