"""The first sentences of a report, computed from the measurements and the checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fewstep.config import decode
from fewstep.eval.metric_table import as_few
from fewstep.report.checks import RATIO, Check, Headline
from fewstep.report.formatting import count, short
from fewstep.report.run_data import Line, RunData, number, on_prompts, whole
from fewstep.runs.command_line import command_line
from fewstep.runs.early_stopping import Best

FAR = 3.0
"""From this multiple of the teacher's distance on, a student has failed rather than lagged."""
WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}


def headline(f: RunData, checks: Sequence[Check], few: int = 0, live: bool = False) -> Headline:
    """What happened, in words.

    `few` counts the held-out samples, where the models had more; `live` says that somebody watches
    the run go on.
    """
    warned = sum(check.passed is False for check in checks)
    if not f.finished:
        share = f.done / f.steps if f.steps else 0.0
        state = "In progress" if live else "Not finished"
        title = f"{state}: step {f.done:,} of {f.steps:,} ({share:.0%})."
        text = "" if live else "Run the same command again to continue it. "
        text += _quick(f)
        return Headline("mixed" if warned else "open", title, text.strip())
    if math.isnan(f.score(f.role, f.distance)):
        if sentence := _protocol(f):
            return Headline("mixed" if warned else "measured", "Finished and measured.", sentence)
        title = "Finished, but not measured yet."
        text = f"{_quick(f)} Measure it with: {measuring(f)}"
        return Headline("mixed" if warned else "open", title, text.strip())
    if f.role == "student" and not math.isnan(f.score("teacher", f.distance)):
        return _student(f, warned, few)
    distance = f.score(f.role, f.distance)
    text = f"{f.distance} {short(distance)}{_beside(f, few)}"
    if warned:
        return Headline("mixed", f"The {f.role} is trained, with {_warnings(warned)}.", text)
    return Headline("good", f"The {f.role} is trained, and passes every check.", text)


def measuring(f: RunData) -> str:
    """The command that measures the run, with its own prompts and CLIP where it has them.

    What run.json does not name is a word in capitals.
    """
    words = ["fewstep", "evaluate", str(f.path)]
    if f.prompted:
        domain = f.run.get("domain")
        named = domain if isinstance(domain, Mapping) else {}
        words += ["--prompts", str(named.get("file") or "FILE")]
        words += ["--clip", str(named.get("clip") or "CLIP")]
    return command_line(words)


def kept(f: RunData) -> str:
    """Which look was the best by `Run.best`, where that model is, and whether it ended the run."""
    try:
        rule: Best = decode(f.run.get("best"), Best)
        best: list[float] = []
        for look in f.gauges if rule.metric else ():
            best = rule.judged(look, best, whole(look, "step"))
    except ValueError:  # of another version, or a metric that is not there
        return ""
    if not best or not (f.path / "best" / "manifest.json").is_file():
        return ""
    value, step, since = best
    text = f"By {rule.metric} the best look was {short(value)}, at step {step:,.0f}: "
    text += f"that model is in {f.path / 'best'}."
    if not f.finished:
        return text
    last = max(f.done, whole(f.last, "step"))
    which = "the same" if step == last else f"the last one, of step {last:,}"
    text += f" {f.path / 'student'}, which this page shows, is {which}."
    if last < f.steps and rule.over({"best": best}):
        text += f" The run ended early, {count(since, 'look')} after its best (Run.best.patience)."
    return text


def _student(f: RunData, warned: int, few: int) -> Headline:
    distance, teacher = f.score("student", f.distance), f.score("teacher", f.distance)
    ratio = distance / teacher if teacher > 0 else math.inf
    calls = saving(f)
    if ratio > FAR:
        mark, title = "bad", "It did not work: far from the teacher."
    elif ratio > RATIO:
        mark, title = "mixed", f"{calls}, but not yet as good."
    elif warned:
        mark, title = "mixed", f"{calls}, with {_warnings(warned)}."
    else:
        mark, title = "good", f"It worked: {calls[0].lower()}{calls[1:]}."
    text = (
        f"{f.distance} {short(distance)} against the teacher's {short(teacher)} "
        f"({short(ratio, 2)} times){_beside(f, few)}"
    )
    return Headline(mark, title, text)


def _protocol(f: RunData) -> str:
    """The first score of each result in the folder evaluation; "" without any.

    Published distances are the best of several runs; a CLIP score is the mean.
    """
    texts = []
    for file, stored in f.evaluations.items():
        lead, runs = next(iter(stored["best"]), ""), len(stored["runs"])
        best, mean = number(stored["best"], lead), number(stored["mean"], lead)
        if not f.still(stored) or math.isnan(best):
            continue
        if on_prompts(file):
            among = f", the mean of {runs} runs" if runs > 1 else ""
            texts.append(f"{lead} {short(mean)}{among}.")
        else:
            among = f", the best of {runs} runs; {short(mean)} on average" if runs > 1 else ""
            texts.append(f"{lead} {short(best)}{among}.")
    return " ".join(texts)


def saving(f: RunData) -> str:
    """ "One call instead of 35"."""
    calls, theirs = f.score("student", "calls"), f.score("teacher", "calls")
    if math.isnan(calls):
        return "The student"
    words = f"{WORDS.get(round(calls), short(calls))} call{'' if calls == 1 else 's'}"
    instead = f" instead of {theirs:,.0f}" if theirs > calls else ""
    return words.capitalize() + instead


def _beside(f: RunData, few: int) -> str:
    anchor = f.score("real", f.distance)
    if math.isnan(anchor):
        return "."
    if not few:
        return f"; real held-out data score {short(anchor)}. Lower is better."
    same = f.score(f.role, as_few(f.distance, few))
    only = f"on {few:,} samples only, which raises it"
    if not math.isnan(same):
        only = f"on {few:,} samples; as few of the {f.role}'s score {short(same)}"
    return f"; real held-out data score {short(anchor)} ({only}). Lower is better."


def _warnings(warned: int) -> str:
    return count(warned, "warning")


class Quick(NamedTuple):
    """The first score of a quick look."""

    name: str
    value: float
    samples: int


def quick(look: Line | None) -> Quick | None:
    """What a look said; None where it measured nothing."""
    scores = look.get("quick") if look else None
    if not isinstance(scores, dict):
        return None
    name = next((key for key in scores if key.startswith("fd") or key == "clip"), "")
    value = number(scores, name)
    if math.isnan(value):
        return None
    called = "the CLIP score" if name == "clip" else name
    return Quick(called, value, whole(scores, "samples"))


def _quick(f: RunData) -> str:
    """What the last quick look said."""
    last = quick(f.last)
    if last is None:
        return ""
    return (
        f"At the last look {last.name} was {short(last.value)}, on {last.samples:,} samples only."
    )
