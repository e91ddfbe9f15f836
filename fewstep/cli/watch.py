"""fewstep watch: the page of a run in progress, in the browser."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.parser import refuse_missing, verb_parser
from fewstep.cli.web_server import require_server, serve_page, server_flags


def run(args: list[str]) -> int:
    """Serve the page of a run until it is stopped."""
    parser = verb_parser(
        "watch",
        "Watch a run in a browser while it trains: progress, the same noise over time, quality, "
        "noise levels, and what goes wrong with what to try. It reads the run's files alone.",
    )
    parser.add_argument("run", type=Path, help="a run folder, finished or not")
    server_flags(parser)
    flags = parser.parse_args(args)
    require_server("watch", flags.port)
    refuse_missing(flags.run)
    from fewstep.report.svg_chart import require
    from fewstep.web.watch import watch

    require()
    watched = watch(flags.run)
    return serve_page(watched.application, flags, "it, not the run")
