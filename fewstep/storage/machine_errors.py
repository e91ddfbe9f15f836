"""Errors of the machine, not of the input: full disks, quotas, failing disks, memory."""

from __future__ import annotations

import errno
import os
import re

ADVICE = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "the disk, or the connection to it, does not work; the system's log tells more",
    errno.ESTALE: "the network disk has gone away; mount it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files; close other programs",
    errno.ENOMEM: "the memory does not suffice; close other programs",
}
"""By the number of the system's error."""
MEMORY = ("allocate memory", "out of memory", "Failed to allocate")


def trouble(error: BaseException) -> OSError | None:
    """The system error behind `error`, if its number is in `ADVICE`; else None.

    Libraries in other languages give the number as text only: "... (os error 28)".
    """
    if isinstance(error, OSError):
        return error if error.errno in ADVICE else None
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(match[1]) if match else 0
    return OSError(number, os.strerror(number)) if number in ADVICE else None


def short_of_memory(error: BaseException) -> bool:
    """Whether the error says that the machine or an accelerator is out of memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(m in str(error) for m in MEMORY))


def sentence(error: BaseException) -> str:
    """The message of an error for a person, such as "digits.png: Permission denied"."""
    if isinstance(error, UnicodeEncodeError):
        shown = ascii(error.object)[:60]
        return f"the name or text {shown} is not UTF-8, and something here needs it to be"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        text = f"{_shown(where)}: {error.strerror}" if where else error.strerror
        if error.errno in ADVICE:
            text += f"; {ADVICE[error.errno]}, then run the same command again: what was saved is "
            text += "kept"
        return text
    return str(error)


def _shown(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, bytes) else str(path)
