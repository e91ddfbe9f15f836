"""fewstep sample: pictures from a finished model into a file or a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.pairing import PAIRINGS
from fewstep.cli.parser import (
    SIZE,
    VAE_OR_NONE,
    code_flag,
    refuse_missing,
    refuse_over,
    verb_parser,
)
from fewstep.cli.sampling_flags import sampling_flags
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
    """Make pictures with a finished model."""
    parser = verb_parser("sample", "Make pictures with a finished model: a student or a teacher.")
    parser.add_argument(
        "model",
        type=Path,
        help="a run folder, a folder with model.json, a pipeline folder, or a snapshot",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png grid, an .npz of arrays, or a new folder: a PNG for each picture, with its "
        "settings in it (default: samples.png)",
    )
    parser.add_argument("--vae", default="", help=VAE_OR_NONE)
    parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
    _what_flags(parser)
    sampling_flags(parser)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    refuse_missing(flags.model)
    refuse_over("--out", flags.out, [flags.model, *([flags.start] if flags.start else [])])
    trust(flags.code, [flags.model])
    from fewstep.cli.sample_pictures import Wish, make

    make(flags.model, flags.out, Wish.asked(flags))
    result({"file": str(flags.out)}, str(flags.out))
    return 0


def _what_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is to be made."""
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,9 (default: 0-63)")
    parser.add_argument("--labels", default="", help="one class number for all, or one a seed")
    parser.add_argument("--prompts", default="", help="a text for all, or a file of them")
    parser.add_argument(
        "--pairing",
        choices=PAIRINGS,
        default="turn",
        help="of prompts and seeds: in turn (the first with the first, ...), or every prompt with "
        "every seed (default: turn)",
    )
    parser.add_argument(
        "--negative",
        default="",
        metavar="TEXT",
        help="with --guidance: a prompt that is led away from",
    )
    parser.add_argument(
        "--no-captions",
        action="store_true",
        help="leave out the prompts and seeds under the pictures of a grid",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="start",
        metavar="PICTURE",
        help="start from a picture in place of noise: a PNG, JPEG or WebP (with --strength)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="with --from: the share of the steps that are made, such as 0.6; 1 keeps least of "
        "the picture",
    )
    parser.add_argument(
        "--walk",
        type=int,
        metavar="N",
        help="N pictures on the way from the first of two --seeds to the second",
    )
    parser.add_argument(
        "--vary",
        type=float,
        metavar="SHARE",
        help="variations of the first of --seeds: a share of noise, such as 0.4 of 1, is added by "
        "each of the others and taken away again",
    )
