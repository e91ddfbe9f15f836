"""fewstep ema: another average of a run's weights."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import TEACHER, code_flag, refuse_missing, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
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
    parser.add_argument("--teacher", default="", help=TEACHER)
    code_flag(parser)
    flags = parser.parse_args(args)
    refuse_missing(flags.run)
    trust(flags.code, [flags.run])
    from fewstep.cli.measure import found_again
    from fewstep.runs.averages import write_average

    if flags.teacher:
        found_again(flags.run, flags.teacher)
    note = write_average(flags.run, flags.sigma_rel, flags.out)
    say(note)
    made = {"model": str(flags.out), "sigma_rel": flags.sigma_rel, "note": note}
    result(made, str(flags.out))
    return 0
