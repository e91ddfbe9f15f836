"""The same run with other training seeds: what of a score is chance.

The ± of one run's measurements is the spread between draws of samples from one model. Another
seed makes another model; only several tell how far a result can be told from luck. Scores s_i of n
seeds have the mean m = sum_i s_i / n and the deviation sqrt(sum_i (s_i - m)^2 / (n - 1)).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.report.run_data import RunData, number, read_run
from fewstep.runs.run_folder import first_difference

APART = ("seed", "sample_every", "save_every", "keep_every")
"""Fields in which repeats may differ."""


class Spread(NamedTuple):
    """Mean, standard deviation (nan of one), and the number n of seeds that have the score."""

    mean: float
    deviation: float
    n: int


def with_repeats(f: RunData, paths: Sequence[Path]) -> RunData:
    """`f` with the runs in `paths`, which differ from it in their seeds alone.

    Raises ValueError where one has other settings, the seed of another, or is no run.
    """
    seen, repeats = {_seed(f): f.path}, []
    for path in paths:
        other = read_run(path)
        if where := _difference(f, other):
            raise ValueError(
                f"{path} is no repeat of {f.path}: {where}; leave it out of --repeats"
            )
        if _seed(other) in seen:
            raise ValueError(
                f"{path} has the seed {_seed(other)}, as {seen[_seed(other)]} has: a repeat is "
                "the same run with another --seed"
            )
        seen[_seed(other)] = path
        repeats.append(other)
    return replace(f, repeats=tuple(repeats))


def seeds(f: RunData) -> str:
    """ "one seed", or "seeds 0, 1 and 2"."""
    if not f.repeats:
        return "one seed"
    known = [str(_seed(each)) for each in (f, *f.repeats)]
    return f"seeds {', '.join(known[:-1])} and {known[-1]}"


def spread(f: RunData, name: str) -> Spread:
    """A measured score of what the run makes, over its seeds."""
    values = [each.score(each.role, name) for each in (f, *f.repeats)]
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < 2:
        return Spread(kept[0] if kept else math.nan, math.nan, len(kept))
    return Spread(statistics.fmean(kept), statistics.stdev(kept), len(kept))


def _seed(f: RunData) -> int:
    return int(number(f.run, "seed"))


def _difference(f: RunData, other: RunData) -> str:
    """The first setting in which two runs differ, in words; "" where they are repeats."""
    mine, its = ({"recipe": x.facts.get("recipe"), "run": _apart(x.run)} for x in (f, other))
    if mine == its:
        return ""
    name, _, values = first_difference(mine, its, "").partition(" was ")
    usual, _, found = values.partition(", now ")
    return f"its {name.lstrip('.')} is {found}, not {usual}"


def _apart(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run without what its repeats may have otherwise."""
    return {name: value for name, value in run.items() if name not in APART}
