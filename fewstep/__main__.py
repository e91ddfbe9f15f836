"""python -m fewstep, and the command `fewstep`."""

from __future__ import annotations

import gc

from fewstep.signals import ended, interruptible


def main() -> None:
    """Answer to signals from the first moment on, then import the command line.

    At the end all objects are kept out of the interpreter's last search for garbage, which takes
    half a second of a process that has imported torch and finds nothing that matters.
    """
    try:
        with interruptible():
            from fewstep.cli import main as command

            command()
    except KeyboardInterrupt as stop:
        raise SystemExit(ended(stop)) from None
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
