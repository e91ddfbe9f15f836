"""The verbs of model files: look inside, convert, average."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.cli.display import say
from fewstep.cli.parser import printable, verb_parser


def inspect(args: list[str]) -> int:
    """What is inside a model file or folder."""
    parser = verb_parser("inspect", "Tell what is inside a model, without executing any of it.")
    parser.add_argument("model", type=Path, help="a .pkl, .pt or .safetensors file, or a folder")
    parser.add_argument("--json", action="store_true", help="for machines")
    own = parser.parse_args(args)
    from fewstep.contents import contents, lines

    facts = contents(own.model)
    print(json.dumps(facts, indent=2) if own.json else "\n".join(map(printable, lines(facts))))
    return 0


def convert(args: list[str]) -> int:
    """A model folder of a snapshot."""
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
    own = parser.parse_args(args)
    from fewstep.teachers.convert import convert as write

    write(own.file, own.out, own.object, own.student)
    print(own.out)
    return 0


def ema(args: list[str]) -> int:
    """Another average of a run's weights."""
    parser = verb_parser(
        "ema",
        "Make a model of another average of a run's weights, of any length, from the averages "
        "that it stored (--power.sigma-rel 0.05 0.1). Karras et al. 2024, arXiv 2312.02696.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--sigma-rel", type=float, required=True, help="length as a part of the training: 0.13"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder, new or empty")
    own = parser.parse_args(args)
    from fewstep.posthoc import write

    mismatch = write(own.run, own.sigma_rel, own.out)
    say(f"the profile is met to {100 * mismatch:.2g} %")
    print(own.out)
    return 0
