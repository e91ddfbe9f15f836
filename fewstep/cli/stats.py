"""fewstep stats: the reference statistics that published measures need."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import FEATURES, fail, refuse_missing, verb_parser


def run(args: list[str]) -> int:
    """Reference statistics of real pictures."""
    parser = verb_parser(
        "stats", "Make the statistics of real pictures that 'evaluate --protocol' compares with."
    )
    parser.add_argument("data", type=Path, help="a folder, .zip or .npz of pictures")
    parser.add_argument("--features", default="", help=FEATURES)
    parser.add_argument("--out", type=Path, required=True, help="the new .npz file to write")
    parser.add_argument(
        "--keep",
        type=int,
        default=10_000,
        help="pictures whose features are kept for KID, precision and recall (default: 10000)",
    )
    parser.add_argument("--batch", type=int, default=100, help="pictures at a time (default: 100)")
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    flags = parser.parse_args(args)
    refuse_missing(flags.data)
    if flags.out.is_file():
        fail(f"{flags.out} exists already; choose another name")
    from fewstep.cli.evaluate_fid50k import make_stats

    make_stats(flags.data, flags.features, flags.out, flags.keep, flags.device, flags.batch)
    result({"file": str(flags.out)}, str(flags.out))
    return 0
