"""Checks with stated thresholds: whether a run worked, and the headline that follows.

Every check is shown with its number and its limit, passed or not, so that a reader can disagree.
The limits are rules of thumb; `Check.why` says where each comes from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.config import decode
from fewstep.diffusion.noise_path import NoisePath
from fewstep.report.formatting import count, short
from fewstep.report.run_data import RunData, number

RATIO = 1.25
"""Frechet distance of a student, in units of the teacher's."""
SHARE = 0.05
"""How far precision and recall may lie below the teacher's."""
SHARE_REAL = 0.10
"""The same for a teacher, against the few held-out pictures."""
ACCURACY = 0.01
COPIES_REAL, COPIES_TEACHER, UNLIKE = 0.8, 0.9, 1.25
"""The nearest training sample, in units of the same for held-out data and for the teacher."""
DIVERSITY = 0.5
FAKE_ERROR = 1.5
RISING = 1.5
LEARNING = 3.0
"""(2 - p) / p at p = 1/2, see `informed`."""
CLEAR = 1.1
"""The same for a trend at nearly all levels."""
NEARLY_ALL = 0.8
LOOKS = 3
"""Looks that must count before the Fisher divergence is judged, and that a trend has at least."""


@dataclass(frozen=True)
class Check:
    """One check of a run: value, limit and verdict."""

    name: str
    value: str
    limit: str
    why: str
    """What the number means and where the limit comes from."""
    passed: bool | None
    """None where it could not be asked."""
    warning: str = ""
    """In words, where it did not pass."""


@dataclass(frozen=True)
class Headline:
    """The title of a report, with its verdict and first sentence."""

    mark: str
    """ "good", "mixed", "bad" or "open"."""
    title: str
    text: str


def checks(f: RunData, diversity: Mapping[str, float]) -> list[Check]:
    """All checks that the measurements of a run allow.

    diversity: of samples by role: real, teacher, student.
    """
    results = [
        _distance(f),
        _share(f, "precision", "some samples look like no real one"),
        _share(f, "recall", "parts of the real data are seldom or never generated"),
        _accuracy(f),
        _nearest(f),
        _diversity(f, diversity),
        _fake_error(f),
        _fisher(f),
        _skipped(f),
    ]
    return [check for check in results if check is not None]


def _distance(f: RunData) -> Check | None:
    distance, anchor = f.score("student", f.distance), f.score("teacher", f.distance)
    if f.role != "student" or not f.metrics:
        return None
    ratio = distance / anchor if anchor > 0 else math.nan
    return Check(
        "Distance",
        f"{short(ratio)} times the teacher's",
        f"at most {RATIO} times",
        f"{f.distance} of the student over that of the teacher; {RATIO} is fewstep's own mark.",
        None if math.isnan(ratio) else ratio <= RATIO,
        f"{f.distance} is {short(ratio)} times the teacher's ({short(distance)} against "
        f"{short(anchor)}): the student's pictures are measurably not its teacher's.",
    )


def _share(f: RunData, name: str, meaning: str) -> Check | None:
    anchor, slack = ("teacher", SHARE) if f.role == "student" else ("real", SHARE_REAL)
    share, theirs = f.score(f.role, name), f.score(anchor, name)
    if math.isnan(share) or math.isnan(theirs):
        return None
    whose = "the teacher's" if anchor == "teacher" else "held-out data's"
    reason = (
        "several times the spread between draws"
        if anchor == "teacher"
        else "wide, because the held-out pictures are few and few pictures flatter recall"
    )
    return Check(
        name.capitalize(),
        short(share),
        f"at least {short(theirs - slack)}",
        f"{whose.capitalize()} {short(theirs)} less {slack:.2f}: {reason}.",
        share >= theirs - slack,
        f"{name.capitalize()} is {short(share)}, {whose} is {short(theirs)}: {meaning}.",
    )


def _accuracy(f: RunData) -> Check | None:
    accuracy, real = f.score(f.role, "accuracy"), f.score("real", "accuracy")
    if math.isnan(accuracy) or math.isnan(real):
        return None
    return Check(
        "Label accuracy",
        f"{accuracy:.1%}",
        f"at least {real - ACCURACY:.1%}",
        f"Real held-out pictures are read correctly in {real:.1%}; less one percentage point.",
        accuracy >= real - ACCURACY,
        f"Only {accuracy:.1%} of the pictures are read as the label they were asked for; "
        f"real ones are in {real:.1%}.",
    )


def _nearest(f: RunData) -> Check | None:
    gap, real = f.score(f.role, "nn"), f.score("real", "nn")
    teacher = f.score("teacher", "nn") if f.role == "student" else math.nan
    if math.isnan(gap) or math.isnan(real):
        return None
    low = max(COPIES_REAL * real, 0.0 if math.isnan(teacher) else COPIES_TEACHER * teacher)
    high = UNLIKE * max(real, 0.0 if math.isnan(teacher) else teacher)
    beside = "" if math.isnan(teacher) else f" and {COPIES_TEACHER} of the teacher's"
    copies = (
        "some may be copies of training data (memorisation), or, where diversity is low too, "
        "blurred averages of them"
    )
    return Check(
        "Neither copies nor strangers",
        f"{short(gap)} to the nearest training sample",
        f"{short(low)} to {short(high)}",
        f"From {COPIES_REAL} of held-out data's {short(real)}{beside}, to {UNLIKE} times the "
        f"larger. A copy has distance 0, so one in five pulls the mean down to {COPIES_REAL}. "
        "Somewhat below held-out data is usual: what models make is smoother.",
        low <= gap <= high,
        f"Samples lie {short(gap)} from the nearest training sample, real held-out ones "
        f"{short(real)}: {copies if gap < low else 'many are unlike any training sample'}.",
    )


def _diversity(f: RunData, diversity: Mapping[str, float]) -> Check | None:
    anchor = "teacher" if f.role == "student" and "teacher" in diversity else "real"
    spread, theirs = diversity.get(f.role, math.nan), diversity.get(anchor, math.nan)
    if math.isnan(spread) or math.isnan(theirs):
        return None
    whose = "the teacher's" if anchor == "teacher" else "real data's"
    return Check(
        "Diversity",
        short(spread),
        f"at least {short(DIVERSITY * theirs)}",
        f"Mean difference between two samples of the same label; half of {whose} "
        f"{short(theirs)}. A collapsing model makes one picture for all noises and falls to 0.",
        spread >= DIVERSITY * theirs,
        f"Diversity is {short(spread)}, less than half of {whose} {short(theirs)}: "
        "the pictures of a label are nearly the same (collapse).",
    )


def _fake_error(f: RunData) -> Check | None:
    ratios = {
        number(x, "t"): number(x, "fake_error") / number(x, "teacher_error")
        for x in f.levels(f.last)
        if number(x, "teacher_error") > 0 and not math.isnan(number(x, "fake_error"))
    }
    if not ratios:
        return None
    t, worst = max(ratios.items(), key=lambda pair: pair[1])
    value = f"{short(worst)} times the teacher's error at worst (t = {short(t)})"
    early = worst <= FAKE_ERROR and f.last not in informed(f)  # a copy of the teacher has 1
    return Check(
        "Fake score keeps up",
        value + (": too early to say, it is still near the teacher" if early else ""),
        f"at most {FAKE_ERROR} times",
        "The fake score is trained on the student's own pictures, so there it should denoise at "
        f"least as well as the teacher does; {FAKE_ERROR} leaves room for a moving target.",
        None if early else worst <= FAKE_ERROR,
        f"At noise level t = {short(t)} the fake score's error is {short(worst)} times the "
        "teacher's: it does not follow the student, whose gradients are then wrong.",
    )


def informed(f: RunData) -> list[dict[str, Any]]:
    """The looks at which the fake score has come at least half the way from teacher to student.

    Before, the Fisher estimate says how far the fake score has learnt, not how far the student is.
    A fake score psi that has gone the share p of the way from its teacher phi to the best answer
    on the student's samples, E[x | xt], has by Pythagoras

        (E |phi - x|^2 - E |psi - x|^2) / E |phi - psi|^2 = (2 - p) / p,

    which is 1 at p = 1 and `LEARNING` at p = 1/2. A look counts by the median of its levels;
    none does where the noise path of the run is not known here.
    """
    try:
        path = decode(f.model.get("path"), NoisePath)
    except ValueError:
        return []
    chosen = []
    for look in f.gauges:
        shares = []
        for level in f.levels(look):
            t, fisher = (
                torch.tensor(number(level, "t"), dtype=torch.float64),
                number(level, "fisher"),
            )
            gap = fisher * float(path.sigma(t) ** 4 / path.alpha(t) ** 2)
            gain = number(level, "teacher_error") - number(level, "fake_error")
            if gap > 0 and not math.isnan(gain):
                shares.append(gain / gap)
        if shares and statistics.median(shares) <= LEARNING:
            chosen.append(look)
    return chosen


def _series(f: RunData, looks: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The positive Fisher estimates of each level, look after look."""
    levels = [f.levels(look) for look in looks]
    series_by_level = []
    for place in range(len(levels[-1]) if levels else 0):
        values = [number(level[place], "fisher") for level in levels if place < len(level)]
        series_by_level.append([value for value in values if value > 0])
    return [series for series in series_by_level if len(series) >= 2]


def rise(f: RunData, looks: Sequence[Mapping[str, Any]]) -> float:
    """Median over levels of the last Fisher estimate over the lowest of the looks before."""
    ratios = [series[-1] / min(series[:-1]) for series in _series(f, looks)]
    return statistics.median(ratios) if ratios else math.nan


def trends(f: RunData, looks: Sequence[Mapping[str, Any]]) -> list[float]:
    """The factor by which the Fisher estimate of each level changes over `looks`.

    exp of the median slope of its logarithm between any two looks (Theil and Sen's estimator),
    times their number less one.
    """
    factors = []
    for series in _series(f, looks):
        logs = [math.log(value) for value in series]
        pairs = [(i, j) for j in range(len(logs)) for i in range(j)]
        slope = statistics.median((logs[j] - logs[i]) / (j - i) for i, j in pairs)
        factors.append(math.exp(slope * (len(logs) - 1)))
    return factors


def _fisher(f: RunData) -> Check | None:
    if not any(number(level, "fisher") > 0 for level in f.levels(f.last)):
        return None
    looks = informed(f)
    lately = looks[-max(LOOKS, len(looks) // 3) :]
    factors = trends(f, lately) if len(looks) >= LOOKS else []
    passed: bool | None = None
    warning = ""
    if not factors:
        value = f"too few looks to say: {len(looks)} of {len(f.gauges)} count, {LOOKS} are needed"
    else:
        ratio, factor = rise(f, looks), statistics.median(factors)
        rising = sum(x > 1 for x in factors)
        where = f"{rising} of {count(len(factors), 'level')}"
        value = (
            f"{short(factor)} times over the last {len(lately)} looks, rising at {where}; "
            f"{short(ratio)} times its lowest before"
        )
        clearly = factor > CLEAR and rising >= NEARLY_ALL * len(factors)
        if ratio > RISING or clearly:
            passed = False
        elif factor < 1:
            passed = True
        else:
            value += ": it has levelled off, or begins to rise"
        how = f"is {short(ratio)} times its lowest"
        if clearly:
            how = f"rises at {where} over the last {len(lately)} looks, and {how}"
        warning = (
            f"The Fisher divergence to the teacher {how}: the student moves away from its "
            "teacher, or does not follow while the fake score finds out how far away it is."
        )
    return Check(
        "Fisher divergence falls",
        value,
        f"below 1 over the last looks; at most {RISING} times its lowest",
        "The estimated divergence to the teacher, at the median noise level: its trend over the "
        f"last third of the looks, and the last one against the best before. {RISING}, and "
        f"{CLEAR} at nearly all levels, are above the noise of the estimate. Looks count from "
        "where the fake score, which begins as the teacher, has come half the way to the student.",
        passed,
        warning,
    )


def _skipped(f: RunData) -> Check | None:
    if not f.log:
        return None
    updates = max(1, f.done * max(1, len(f.nets)))
    return Check(
        "Finite numbers",
        f"{count(f.skipped, 'skipped update')}",
        "none",
        "An update whose loss or gradient is not finite is skipped and counted, never applied.",
        f.skipped == 0,
        f"{count(f.skipped, 'update')} of {updates:,} ({f.skipped / updates:.2%}) had a loss or "
        "gradient that was not finite and were skipped; a lower learning rate usually helps.",
    )
