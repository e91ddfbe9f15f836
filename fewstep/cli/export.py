"""fewstep export: a student as files of other programs."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import code_flag, refuse_missing, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.export.formats import FORMATS, export, format_called, notes
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
    """A student as files of other programs."""
    formats = "; ".join(f"{name}: {form.what}" for name, form in FORMATS.items())
    parser = verb_parser(
        "export",
        "Write a finished student for other programs. What is written is loaded again and "
        "compared with the student before it is kept.",
    )
    parser.add_argument("run", type=Path, help="a run folder, or a folder with model.json")
    parser.add_argument("out", type=Path, help="the folder or file to write, new or empty")
    parser.add_argument("--to", default="diffusers", metavar="FORMAT", help=formats)
    parser.add_argument(
        "--rank", type=int, help="of an adapter (default: the one that was trained)"
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="of a pipeline as pt2 or onnx: the VAE's decoder is a part of the program",
    )
    code_flag(parser)
    flags = parser.parse_args(args)
    format_called(flags.to)
    refuse_missing(flags.run)
    trust(flags.code, [flags.run])
    off = export(flags.run, flags.out, flags.to, flags.rank, flags.pictures)
    say(f"differs from the student by {off:.1g} of its range")
    told = list(notes(flags.run, flags.to))
    for note in told:
        say(note)
    made = {"file": str(flags.out), "format": flags.to, "difference": off, "notes": told}
    result(made, str(flags.out))
    return 0
