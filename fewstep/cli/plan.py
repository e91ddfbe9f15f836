"""fewstep plan: what each way of distilling a teacher takes, as a table, and a command line."""

from __future__ import annotations

import math
from argparse import ArgumentParser

from fewstep.cli.output import result
from fewstep.cli.parser import SIZE, Parser, code_flag, fail, verb_parser
from fewstep.plan.links import Links

RATE = 80.0
"""Tera-operations a second in bf16 that a GPU is taken to sustain."""
MOST = 100_000
"""Samples that a GPU may be asked to compute at once."""


def run(args: list[str]) -> int:
    """Print what each way of distilling a teacher takes; returns the exit code."""
    parser = _parser()
    flags, rest = parser.parse_known_args(args)
    if not 1 <= min(flags.at_once) <= max(flags.at_once) <= MOST:
        fail(f"--at-once is from 1 to {MOST:,} samples")
    if not 0 < flags.tflops < math.inf:
        fail(f"--tflops is a positive number, got {flags.tflops:g}")
    from fewstep.cli.plan_table import plan

    result(*plan(flags, rest, parser.flags()))
    return 0


def _parser() -> Parser:
    """The flags of the verb."""
    parser = verb_parser(
        "plan",
        "Tell the memory and time of each way to distil a teacher on given GPUs, before anything "
        "is loaded: a step of the recipe is done on tensors that have no numbers. The recipe's "
        "own flags, such as --method, may follow.",
    )
    parser.add_argument(
        "teacher",
        help="a pipeline folder or hub:ORG/NAME, a finished run or model folder, or a snapshot",
    )
    parser.add_argument("--gpus", required=True, help="how many of which memory, such as 1x24GB")
    parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
    parser.add_argument("--recipe", default="", help="(default: the recipe for such a teacher)")
    parser.add_argument(
        "--at-once",
        type=int,
        nargs="+",
        default=[4],
        metavar="N",
        help="samples that a GPU computes at once (default: 4)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=RATE,
        help=f"10^12 operations a second a GPU sustains in bf16 (default: {RATE:g})",
    )
    _link_flags(parser)
    code_flag(parser)
    return parser


def _link_flags(parser: ArgumentParser) -> None:
    """What is assumed of the machines beside their memory."""
    known = Links()
    group = parser.add_argument_group("several GPUs")
    group.add_argument(
        "--per-node",
        type=int,
        default=known.per_node,
        metavar="N",
        help=f"GPUs of a node (default: {known.per_node})",
    )
    rates = {
        "within": "a GPU sends to others of its node, such as by NVLink",
        "between": "a GPU sends to other nodes, such as by InfiniBand",
        "disk": "a checkpoint is written",
    }
    for name, what in rates.items():
        rate = getattr(known, name) / 1e9
        text = f"GB/s at which {what} (default: {rate:g})"
        group.add_argument(f"--{name}", type=float, default=rate, metavar="GB/S", help=text)
    group.add_argument(
        "--hop",
        type=float,
        default=known.hop * 1e6,
        metavar="MICROSECONDS",
        help=f"that the shortest message takes to the next GPU (default: {known.hop * 1e6:g})",
    )
