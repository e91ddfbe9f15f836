"""Runs side by side as data: what each reached, what it cost, and what sets them apart.

Runs whose settings differ in the seed alone are repeats: they form a group. Two groups are
compared seed by seed where both have the same ones, with Student's 95 % interval for the mean
difference.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.compare.cost import Forwards, forwards
from fewstep.report.run_data import RunData, number, read_run
from fewstep.report.tables import flat
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model
from fewstep.storage.user_code import decoded

SHOWN = ("precision", "recall", "diversity")
"""Scores beside the distance, in the table."""
UNCOUNTED = ("seed", "sample_every", "save_every", "keep_every")
"""Fields in which repeats may differ."""


class Interval(NamedTuple):
    """The mean of a score over n seeds, and Student's 95 % interval: nan of one seed."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed; nan is left out."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean, n = statistics.fmean(kept), len(kept)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(kept) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Entry:
    """One run of the comparison."""

    name: str
    f: RunData
    cost: Forwards
    note: str = ""
    """Why something of it is missing."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(number(self.f.run, "seed"))

    @property
    def calls(self) -> float:
        """Network calls a sample, of what the run ships."""
        return self.score("calls")

    @cached_property
    def clock(self) -> dict[float, float]:
        """Step -> seconds of training until then; time that a stopped run lost is not counted."""
        total, last, found = 0.0, 0.0, {0.0: 0.0}
        for line in self.f.log:
            now = number(line, "seconds")
            if math.isfinite(now):
                total += now - last if now >= last else now
                last = now
                found[number(line, "step")] = total
        return found

    def score(self, name: str) -> float:
        """As `fewstep evaluate` measured it; nan where it did not."""
        if name == "diversity":
            return number(self.f.last, name)
        return self.f.score(self.f.role, name)

    def quick(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """(look, score) of each look while training."""
        looks = [(look, look.get("quick")) for look in self.f.gauges]
        return [(look, number(quick, name)) for look, quick in looks if isinstance(quick, Mapping)]

    def settings(self) -> dict[str, str]:
        """Every field of the run by its path, as text."""
        return dict(flat(self.f.run))

    def json(self) -> dict[str, Any]:
        """The run as JSON values; what is not known is None."""
        scores = self.f.metrics.get(self.f.role, {})
        last = self.f.last or {}
        quick = last.get("quick") or {}
        return {
            "name": self.name,
            "path": str(self.f.path),
            "method": self.f.method,
            "seed": self.seed,
            "finished": self.f.finished,
            "calls": plain(self.calls),
            "steps": self.f.done,
            "images": self.f.images,
            "seconds": round(max(self.clock.values()), 2),
            "forwards_a_step": plain(self.cost.step),
            "forwards_before": plain(self.cost.before),
            "forwards": plain(self.cost.at(self.f.done)),
            "skipped": self.f.skipped,
            "diversity": plain(self.score("diversity")),
            "scores": {name: plain(value) for name, value in scores.items()},
            "quick": {k: plain(number(quick, k)) for k in quick}
            if isinstance(quick, dict)
            else {},
            "note": self.note,
        }


def plain(value: float) -> float | None:
    """None in place of nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone."""

    entries: list[Entry]

    @property
    def name(self) -> str:
        """That of its run, or what its runs' names begin with."""
        names = [entry.name for entry in self.entries]
        if len(names) == 1:
            return names[0]
        start = names[0]
        while not all(name.startswith(start) for name in names):
            start = start[:-1]
        return start.rstrip("-_./ ") or names[0]

    def score(self, name: str) -> Interval:
        """The mean over its seeds."""
        return interval([entry.score(name) for entry in self.entries])

    def mean(self, of: str) -> float:
        """The mean of a field of `Entry.json` over its runs."""
        values = [entry.json()[of] for entry in self.entries]
        return statistics.fmean(values) if None not in values else math.nan


class Difference(NamedTuple):
    """Two groups, seed by seed: b less a."""

    a: str
    b: str
    score: str
    of: Interval

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.of.low > 0 or self.of.high < 0


@dataclass(frozen=True)
class Comparison:
    """All that a comparison says."""

    groups: list[Group]
    teacher: dict[str, float]
    """The teacher's scores, as they were measured beside a run."""
    notes: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """The runs, in the order of their groups."""
        return [entry for group in self.groups for entry in group.entries]

    @property
    def distance(self) -> str:
        """The score that ranks: the Frechet distance of the domain, "" where none was measured."""
        named = (entry.f.distance for entry in self.entries)
        return next((name for name in named if name), self._quickest())

    def _quickest(self) -> str:
        names = (name for e in self.entries for name in (e.f.last or {}).get("quick") or {})
        return next((name for name in names if name != "samples"), "")

    @property
    def shown(self) -> list[str]:
        """The scores in the table."""
        known = {name for entry in self.entries for name in entry.f.metrics.get(entry.f.role, {})}
        rest = [name for name in SHOWN if name in known or name == "diversity"]
        return [name for name in (self.distance, *rest) if name]

    def differing(self) -> list[tuple[str, list[str]]]:
        """(path of a field, its value in each group), where they are not all the same."""
        each = [group.entries[0].settings() for group in self.groups]
        paths = dict.fromkeys(path for one in each for path in one)
        rows = [(path, [one.get(path, "") for one in each]) for path in paths]
        skipped = UNCOUNTED
        return [row for row in rows if len(set(row[1])) > 1 and row[0] not in skipped]

    def differences(self) -> list[Difference]:
        """The distance of every two groups that share at least two seeds."""
        found = []
        for i, a in enumerate(self.groups):
            for b in self.groups[i + 1 :]:
                left, right = ({e.seed: e.score(self.distance) for e in g.entries} for g in (a, b))
                both = [right[s] - left[s] for s in left if s in right]
                both = [value for value in both if math.isfinite(value)]
                if len(both) > 1:
                    found.append(Difference(a.name, b.name, self.distance, interval(both)))
        return found

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""

        def span(one: Interval) -> dict[str, Any]:
            return {
                "mean": plain(one.mean),
                "low": plain(one.low),
                "high": plain(one.high),
                "n": one.n,
            }

        return {
            "distance": self.distance,
            "unit": "forward passes of one sample through the teacher's network",
            "teacher": {name: plain(value) for name, value in self.teacher.items()},
            "runs": [entry.json() for entry in self.entries],
            "groups": [
                {
                    "name": group.name,
                    "runs": [entry.name for entry in group.entries],
                    "scores": {name: span(group.score(name)) for name in self.shown},
                }
                for group in self.groups
            ],
            "differences": [
                {"a": d.a, "b": d.b, "score": d.score, **span(d.of), "clear": d.clear}
                for d in self.differences()
            ],
            "settings": {
                path: dict(zip((g.name for g in self.groups), values, strict=True))
                for path, values in self.differing()
            },
            "notes": self.notes,
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the run folders `paths`, at least one.

    Raises ValueError where one is no run or is named twice, and where their data differ, since
    their scores are then of different things.
    """
    twice = [path for i, path in enumerate(paths) if path.resolve() in _resolved(paths[:i])]
    if twice:
        raise ValueError(f"{twice[0]} is named twice; name each run once")
    names = _names(paths)
    found = [_entry(name, read_run(path)) for name, path in zip(names, paths, strict=True)]
    _of_one_domain(found)
    groups: dict[str, Group] = {}
    for entry in found:
        alike = {k: v for k, v in entry.settings().items() if k not in UNCOUNTED}
        key = json.dumps([alike, entry.f.facts.get("teacher")], sort_keys=True)
        groups.setdefault(key, Group([])).entries.append(entry)
    teachers = [entry.f.metrics["teacher"] for entry in found if "teacher" in entry.f.metrics]
    return Comparison(list(groups.values()), (teachers or [{}])[0], list(_notes(found)))


def _resolved(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


def _entry(name: str, f: RunData) -> Entry:
    """A run with its cost, or with the reason why that is not known."""
    where = f.facts.get("teacher")
    try:
        run: Run = decoded(f.run, Run, f.path)
        teacher = describe_model(where) if where and run.distils else None
        cost = forwards(run, teacher, f.score("teacher", "calls"))
    except (ValueError, OSError) as error:
        return Entry(name, f, Forwards(math.nan), f"{name}: its cost is not known: {error}")
    return Entry(name, f, cost)


def _of_one_domain(entries: Sequence[Entry]) -> None:
    """ValueError where the data that scores are taken on are not the same."""

    def data(entry: Entry) -> str:
        domain = entry.f.run.get("domain")
        return str(domain.get("type")) if isinstance(domain, Mapping) else "?"

    first = entries[0]
    for entry in entries[1:]:
        if data(entry) != data(first):
            raise ValueError(
                f"{first.name} is of {data(first)}, {entry.name} of {data(entry)}: their scores "
                "are of different things; compare runs of one kind of data"
            )


def _notes(entries: Sequence[Entry]) -> Iterator[str]:
    """What a reader should know before comparing."""
    yield from (entry.note for entry in entries if entry.note)
    unmeasured = [entry.name for entry in entries if not entry.f.metrics]
    if unmeasured:
        yield f"Not measured yet: {', '.join(unmeasured)}; 'fewstep evaluate RUN' does it."
    unfinished = [entry.name for entry in entries if not entry.f.finished]
    if unfinished:
        yield f"Not finished: {', '.join(unfinished)}."
    protocols = {_protocol(entry) for entry in entries if entry.f.metrics}
    if len(protocols) > 1:
        yield (
            "Measured on different numbers of samples, which shifts every distance: "
            f"{'; '.join(sorted(protocols))}."
        )
    teachers = {json.dumps((e.f.facts.get("digests") or {}).get("teacher")) for e in entries}
    if len(teachers) > 1:
        yield "They have different teachers."
    if len({entry.seed for entry in entries}) == 1 and len(entries) > 1:
        yield "One seed each: differences between seeds are not shown, and may be as large."


def _protocol(entry: Entry) -> str:
    p = entry.f.protocol
    with suppress(ValueError):
        return f"{p.get('draws')} draws of {p.get('samples')}"
    return "?"
