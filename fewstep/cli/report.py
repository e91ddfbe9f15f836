"""fewstep report: one self-contained page of a run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import TEACHER, code_flag, refuse_missing, require_finite, verb_parser
from fewstep.cli.progress_bar import Bar
from fewstep.storage.user_code import trust
from fewstep.training.progress import listen


def run(args: list[str]) -> int:
    """One self-contained page of a run."""
    text = "Write report.html, one self-contained page, into a run folder."
    parser = verb_parser("report", text)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--teacher", default="", help=TEACHER)
    parser.add_argument(
        "--repeats",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="the same run with other seeds: the page shows the spread between them",
    )
    parser.add_argument(
        "--no-teacher",
        action="store_true",
        help="leave out the teacher's pictures: those of a pipeline take 28 or 50 calls each",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="of the teacher's pictures, where the model takes prompts (default: 1, none)",
    )
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    refuse_missing(flags.run, *flags.repeats)
    require_finite("--guidance", flags.guidance)
    trust(flags.code, [flags.run])
    from fewstep.cli.measure import found_again
    from fewstep.report.page import write_report
    from fewstep.report.sample_images import Making

    if flags.teacher:
        found_again(flags.run, flags.teacher)
    making = Making(flags.device, not flags.no_teacher, flags.guidance)
    with ExitStack() as shown:
        bars: dict[str, Bar] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.enter_context(Bar(what, total))
            bars[what].update(done)

        with listen(show):
            page = write_report(flags.run, making, flags.repeats)
    result({"report": str(page)}, str(page))
    return 0
