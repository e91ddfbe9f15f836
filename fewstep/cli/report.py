"""fewstep report: one self-contained page of a run."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.measure import found_again
from fewstep.cli.parser import TEACHER, code_flag, verb_parser


def run(args: list[str]) -> int:
    """One self-contained page of a run."""
    text = "Write report.html, one self-contained page, into a run folder."
    parser = verb_parser("report", text)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--teacher", default="", help=TEACHER)
    code_flag(parser)
    flags = parser.parse_args(args)
    from fewstep.report.page import write_report
    from fewstep.storage.user_code import trust

    trust(flags.code, [flags.run])
    if flags.teacher:
        found_again(flags.run, flags.teacher)
    print(write_report(flags.run))
    return 0
