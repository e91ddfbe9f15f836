"""The flags of how a model is sampled.

--guidance, --guide-between           guidance, at all noise levels or at some
--solver, --schedule                  of teachers
--steps                               of both
--assist, --assist-share              of students, with their teacher's help
"""

from __future__ import annotations

import argparse
from typing import Literal, get_args

Solver = Literal["heun", "ddim", "dpm++", "unipc"]
SOLVERS = get_args(Solver)
Schedule = Literal["karras", "logsnr"]
SCHEDULES = get_args(Schedule)
NAMES = ("guidance", "guide_between", "solver", "steps", "schedule", "assist", "assist_share")
"""The flags, as their values are called."""


def sampling_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags; `fewstep.cli.sampling.Sampling.asked` reads them."""
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance, of a teacher: such as 7.5 (default: 1, none)",
    )
    parser.add_argument(
        "--guide-between",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="with --guidance: guide at noise levels sigma/alpha above LO up to HI alone, such as "
        "0.28 2.9: more variety, and one call in place of two elsewhere",
    )
    parser.add_argument(
        "--solver", choices=SOLVERS, help="how a teacher is sampled (default: its own way)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of a teacher, two calls each by heun, or of a student, at its best in "
        "its own (default: its own)",
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="how a teacher's steps are spaced: karras (noise levels to the power 1/7) or logsnr "
        "(even in ln alpha/sigma), between the ends of its own (default: its own)",
    )
    parser.add_argument(
        "--assist",
        metavar="EXPR",
        help="let the teacher help its student: 'Corrected(0.4)' draws the first prediction "
        "towards the teacher's (sharper), 'Handover(5)' has the teacher make the first step, in 5 "
        "steps of its own (more variety), 'Gated()' has it work over the samples that it would "
        "change most (fewer failures); the first two are for students of two steps or more",
    )
    parser.add_argument(
        "--assist-share",
        type=float,
        help="with --assist 'Gated()': the share of samples that is worked over (default: 0.5)",
    )
