"""fewstep compare: runs side by side, as a table, a page, JSON or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.output import as_json, result
from fewstep.cli.parser import code_flag, fail, refuse_missing, refuse_over, verb_parser
from fewstep.cli.progress_bar import Bar, say
from fewstep.storage.files import write
from fewstep.storage.machine_errors import trouble
from fewstep.storage.user_code import trust
from fewstep.training.progress import listen

if TYPE_CHECKING:
    from fewstep.compare.page import Row


def run(args: list[str]) -> int:
    """Compare runs; returns the exit code."""
    parser = verb_parser(
        "compare",
        "Put runs side by side: what each reached and what it cost, counted in forward passes of "
        "the teacher's network. Runs that differ in the seed alone are taken together, and two "
        "settings are compared seed by seed. Writes one self-contained page, compare.html.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="the page, a .html file (default: compare.html)")
    parser.add_argument("--no-page", action="store_true", help="print the table alone")
    parser.add_argument("--csv", action="store_true", help="print a line for each run as CSV")
    parser.add_argument(
        "--no-teacher", action="store_true", help="leave out the teacher's pictures"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    if flags.csv and as_json():
        fail("--csv and --json are two forms of the result: leave one of them out")
    refuse_missing(*flags.runs)
    if flags.no_page and flags.out is not None:
        fail("--out and --no-page contradict each other: leave one of them out")
    out = flags.out or Path("compare.html")
    _refuse_place(out, flags.runs)
    from fewstep.compare import page
    from fewstep.compare.table import compare
    from fewstep.report.sample_images import Making

    making = Making(flags.device, not flags.no_teacher)
    trust(flags.code, flags.runs)
    with ExitStack() as shown:
        bars: dict[str, Bar] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.enter_context(Bar(what, total))
            bars[what].update(done)

        with listen(show):
            found = compare(flags.runs)
            html = "" if flags.no_page else page.render(found, making)
    if flags.csv:
        text = as_csv([entry.json() for entry in found.entries]).rstrip("\n")
    else:
        notes = [f"note: {note}" for note in found.notes]
        text = "\n".join([table(page.columns(found), page.rows(found)), *notes])
    result(found.json(), text)
    if html:
        _write(out, html)
        say(str(out))
    return 0


def _refuse_place(out: Path, runs: Sequence[Path]) -> None:
    """Fail where no page can be written, or where something else would be lost."""
    if out.is_dir():
        fail(f"{out} is a folder; name a file for the page")
    if not out.parent.is_dir():
        fail(f"cannot write {out}: there is no folder {out.parent}")
    if out.suffix != ".html":
        fail(f"--out is a page, whose name ends in .html; got {out}")
    refuse_over("--out", out, runs)


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows for a terminal; under a mean over seeds stands its interval."""
    lines = [["run", "method", "seed", *columns]]
    for row in rows:
        lines.append([row.name, row.method, row.seeds, *(text for text, _ in row.cells)])
        if any(spread for _, spread in row.cells):
            lines.append(["", "", "", *(spread for _, spread in row.cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*words, *numbers]).rstrip()


def as_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: its fields, then its scores; what is not known is empty."""
    scores = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    fields = [name for name in runs[0] if name not in ("scores", "quick")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fields, *scores])
    for run in runs:
        found = [*(run[name] for name in fields), *(run["scores"].get(name) for name in scores)]
        writer.writerow(["" if value is None else value for value in found])
    return out.getvalue()


def _write(path: Path, page: str) -> None:
    """Write the page; ValueError where it cannot be written there."""
    try:
        write(path, page)
    except OSError as error:
        if trouble(error):
            raise
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
