"""fewstep inspect: what is inside a model file or folder."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import printable, refuse_missing, verb_parser


def run(args: list[str]) -> int:
    """What is inside a model file or folder."""
    parser = verb_parser("inspect", "Tell what is inside a model, without executing any of it.")
    parser.add_argument("model", type=Path, help="a .pkl, .pt or .safetensors file, or a folder")
    flags = parser.parse_args(args)
    refuse_missing(flags.model)
    from fewstep.runs.inspection import as_lines, inspect_model

    facts = inspect_model(flags.model)
    result(facts, "\n".join(map(printable, as_lines(facts))))
    return 0
