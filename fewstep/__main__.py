"""python -m fewstep, and the command `fewstep`."""

from __future__ import annotations

from fewstep.signals import ended, interruptible


def main() -> None:
    """Answer to signals from the first moment on, then import the command line."""
    try:
        with interruptible():
            from fewstep.cli import main as command

            command()
    except KeyboardInterrupt as stop:
        raise SystemExit(ended(stop)) from None


if __name__ == "__main__":
    main()
