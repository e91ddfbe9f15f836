"""What verbs that serve a page have in common: their flags, what they need, and how they end."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from fewstep.cli.output import result
from fewstep.cli.parser import fail
from fewstep.cli.progress_bar import say
from fewstep.signals import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

    from fewstep.web.shell import Door


def server_flags(parser: argparse.ArgumentParser) -> None:
    """Add --port and --open."""
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def require_server(verb: str, port: int) -> None:
    """Refuse a port that is none, and a missing library, in a sentence."""
    if not 0 <= port <= 65535:
        fail(f"--port is a number from 0 to 65535, got {port}")
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            fail(f"fewstep {verb} needs {name}; install it with: pip install 'fewstep[serve]'")


def serve_page(application: Callable[[], ASGIApp], flags: argparse.Namespace, stops: str) -> int:
    """Serve until it is stopped; the exit code.

    application: makes what answers; flags: those of `server_flags`; stops: what Ctrl-C does.
    """
    from fewstep.web.shell import serve

    def ready(door: Door) -> None:
        result({"address": door.address}, door.address)
        say(f"this address is for this machine alone; Ctrl-C stops {stops}")
        if flags.open:
            import webbrowser

            webbrowser.open(door.address)

    try:
        serve(lambda _: application(), flags.port, ready)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped):
            return 0
        raise
    return 0
