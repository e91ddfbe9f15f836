"""fewstep convert: a model folder of a published snapshot."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import verb_parser


def run(args: list[str]) -> int:
    """Write a model folder from a published snapshot; returns the exit code."""
    parser = verb_parser(
        "convert",
        "Make a model folder (safetensors and JSON) of a snapshot of EDM, EDM2, SiD or SiDA, "
        "for 'sample', 'inspect' and 'distill --teacher'. Nothing in the file is executed.",
    )
    parser.add_argument("file", type=Path, help="a snapshot (.pkl) or training state (.pt)")
    parser.add_argument("out", type=Path, help="the folder, new or empty")
    parser.add_argument(
        "--object", default="", help="which network of the file (default: ema, G_ema, or the only)"
    )
    parser.add_argument(
        "--student", action="store_true", help="a one-step generator, as of SiD and SiDA"
    )
    flags = parser.parse_args(args)
    from fewstep.teachers.snapshots import convert as write

    write(flags.file, flags.out, flags.object, flags.student)
    result({"model": str(flags.out)}, str(flags.out))
    return 0
