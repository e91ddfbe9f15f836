"""What goes wrong in a run that is still going, from its log and its looks alone.

    not finite          updates were skipped, since a loss or a gradient was not a finite number
    diverging           the Frechet distance is far above its best, or the values leave all bounds
    collapse            samples of a label are nearly the same, but for the noise they were made of
    saturation          values sit at the ends of the real range, or contrast is another
    fake score lagging  the fake score denoises the student's samples worse than the teacher,
                        or is still what it began as
    alignment           samples no longer are what the label or the prompt asks for

Students of one call begin as blurred means, so that little diversity, contrast or agreement is no
fault by itself at first: those are judged against their own best, or once they have had `LOOKS`
looks to rise. The limits are rules of thumb, tried on runs that were spoilt on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.report.checks import DIVERSITY, FAKE_ERROR
from fewstep.report.formatting import count, short
from fewstep.report.run_data import Line, RunData, finite, number

LOOKS = 3
"""Looks, that of the beginning included, before a student that does not rise is called so."""
EARLY = 50
"""Steps in which a network may still be what it began as."""
NEARLY_NONE = 0.1
"""Of the diversity of real data."""
NONE_AT_ALL = 0.02
"""Of the same, where no network that learns would be after `EARLY` steps."""
WORSE = 3.0
"""Times its lowest, for a Frechet distance that diverges."""
THAN_AT_FIRST = 2.0
"""Times what it began with: of a beginning that is poor itself, nothing is three times as far."""
BEYOND = 3.0
"""Times the spread of real data."""
CONTRAST = 1.3
UNCHANGED = 1e-4
"""Relative difference of the fake score's errors and the teacher's, while it still is a copy."""
LOST = 0.7
"""Of the best agreement with the labels so far."""
LOST_CLIP = 0.9


@dataclass(frozen=True)
class RunWarning:
    """One thing that goes wrong."""

    name: str
    found: str
    """With its numbers."""
    meaning: str
    advice: str
    """What to try."""
    check: str = ""
    """The name of the check of the report that says the same."""


def run_warnings(f: RunData) -> list[RunWarning]:
    """All warnings of a run so far; none for what was not measured."""
    judges: tuple[Callable[[RunData], RunWarning | None], ...] = (
        _not_finite,
        _diverging,
        _collapse,
        _saturation,
        _lagging,
        _alignment,
    )
    return [warning for judge in judges if (warning := judge(f)) is not None]


def _quick(f: RunData, name: str) -> list[float]:
    """A quick score, look after look."""
    return finite([q for look in f.gauges if isinstance(q := look.get("quick"), dict)], name)


def _real(f: RunData) -> Line:
    real = f.last.get("real") if f.last else None
    return real if isinstance(real, dict) else {}


def _not_finite(f: RunData) -> RunWarning | None:
    broken = [
        name
        for line in f.log[-1:]
        for name in line
        if name.endswith(("/loss", "/grad_norm")) and not math.isfinite(number(line, name))
    ]
    if not f.skipped and not broken:
        return None
    found = f"{count(f.skipped, 'update')} skipped in {f.done:,} steps"
    return RunWarning(
        "Numbers that are not finite",
        found + (f"; {', '.join(broken)} at the last step." if broken else "."),
        "A loss or a gradient overflowed; such an update is left out, so the networks are sound, "
        "but those that were applied just before may have been far too large.",
        "Lower the learning rate (--optim.lr) or clip gradients; in half precision try bf16.",
        "Finite numbers",
    )


def _diverging(f: RunData) -> RunWarning | None:
    found = []
    for name in next(
        (list(q) for x in f.gauges[-1:] if isinstance(q := x.get("quick"), dict)), []
    ):
        values = _quick(f, name) if name.startswith("fd") else []
        if len(values) > 1 and values[-1] > WORSE * min(values):
            found.append(f"{name} is {short(values[-1])}, {short(min(values))} at its best")
        elif values and values[-1] > THAN_AT_FIRST * values[0]:
            found.append(f"{name} is {short(values[-1])}, {short(values[0])} at the beginning")
    spread, real = number(f.last, "spread"), number(_real(f), "spread")
    if spread > BEYOND * real:
        found.append(f"the values' spread is {short(spread)}, that of real data {short(real)}")
    if not found:
        return None
    return RunWarning(
        "Training diverges",
        f"{'; '.join(found)}.".capitalize() if not found[0].startswith("fd") else f"{found[0]}.",
        "The student moves away from what it is to learn.",
        "Lower the learning rate (--optim.lr) by 10, lengthen the warm-up, and continue from a "
        "checkpoint before the rise.",
    )


def _collapse(f: RunData) -> RunWarning | None:
    looks = [look for look in f.gauges if math.isfinite(number(look, "diversity"))]
    values, own = finite(looks, "diversity"), [_own_diversity(look) for look in looks]
    real = number(_real(f), "diversity")
    if len(values) < 2:
        return None
    last, best = values[-1], max(values[:-1])
    against = real if real > 0 else max(best, number(looks[-1], "spread"))
    fell = last < DIVERSITY * best and last < DIVERSITY * against
    never = len(values) >= LOOKS and own[-1] < NEARLY_NONE * against and own[-1] <= 1.2 * own[0]
    none = number(looks[-1], "step") >= EARLY and own[-1] <= NONE_AT_ALL * against
    if not (fell or never or none):
        return None
    beside = f"; real data {short(real)}" if real > 0 else ""
    if (share := number(looks[-1], "passed")) > 0.5:
        beside += f"; {share:.0%} of it is the noise they were made of"
    return RunWarning(
        "Diversity collapses",
        f"Two samples of a label differ by {short(last)}, at most {short(best)} before{beside}.",
        "The student makes nearly the same sample whatever the noise: it finds one that pleases "
        "the loss instead of the whole distribution.",
        "Lower the student's rate or give the fake score more turns; start from the teacher's "
        "weights; add a regression or an adversarial term on data.",
        "Diversity",
    )


def _own_diversity(look: Line) -> float:
    """The diversity of a look without the noise that merely passed through."""
    share = number(look, "passed")
    return number(look, "diversity") * math.sqrt(max(0.0, 1 - share) if share == share else 1.0)


def _saturation(f: RunData) -> RunWarning | None:
    share, real = number(f.last, "extremes"), number(_real(f), "extremes")
    spread, usual = number(f.last, "spread"), number(_real(f), "spread")
    if share > (1 + real) / 2:
        found = f"{share:.0%} of the values lie at the ends of the range, {real:.0%} of real ones."
    elif spread > CONTRAST * usual:
        found = f"Contrast is {short(spread)}, that of real data {short(usual)}."
    else:
        return None
    return RunWarning(
        "Values saturate",
        found,
        "Pictures are driven to pure black and white, or to glaring colours: too strong guidance, "
        "or a student that overshoots.",
        "Lower the guidance scale of the teacher or the rate; watch whether it recedes with the "
        "average of the weights.",
    )


def _lagging(f: RunData) -> RunWarning | None:
    ratios = _ratios(f, f.last)
    before = [_ratios(f, look) for look in f.gauges if number(look, "step") >= EARLY]
    same = [all(abs(r - 1) < UNCHANGED for r in looks) for looks in before if looks]
    if ratios and max(ratios) > FAKE_ERROR and len(f.gauges) > 1:
        found = f"Its error is up to {short(max(ratios))} times the teacher's."
    elif same and all(same):
        found = f"It is still the teacher's copy that it began as, after {count(f.done, 'step')}."
    else:
        return None
    return RunWarning(
        "The fake score lags behind",
        found,
        "The fake score is to know what the student makes now; where it does not, the student's "
        "gradient points the wrong way, or is nought.",
        "Give the fake score more turns for each of the student's (--method.ratio, a number or "
        "auto), or a higher rate (--fake-optim), and see that its weights are trained at all.",
        "Fake score keeps up",
    )


def _ratios(f: RunData, look: Line | None) -> list[float]:
    """The fake score's error over the teacher's, by noise level."""
    pairs: Sequence[tuple[float, float]] = [
        (number(x, "fake_error"), number(x, "teacher_error")) for x in f.levels(look)
    ]
    return [a / b for a, b in pairs if math.isfinite(a) and b > 0]


def _alignment(f: RunData) -> RunWarning | None:
    for name, share in (("accuracy", LOST), ("clip", LOST_CLIP)):
        values = _quick(f, name)
        if len(values) > 1 and values[-1] < share * max(values):
            return RunWarning(
                "Samples leave what was asked for",
                f"{name} is {short(values[-1])}, {short(max(values))} at its best.",
                "Samples agree less with their labels or prompts than they did.",
                "Lower the rate; raise the teacher's guidance a little; keep the model of the "
                f"best look (--best.metric quick.{name}).",
            )
    return None
