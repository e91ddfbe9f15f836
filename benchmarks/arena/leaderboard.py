"""What the trials say: one row a method and number of calls, in the order of its distance.

Of a row's trials of tuning the best by validation noise is reported, with all its seeds, on test
noise. Intervals are Student's, over seeds, of 95 %. `summarise` gives benchmarks/results/arena/
summary.json, whose fields are the figures of docs/arena.md and docs/choosing.md.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arena import records
from benchmarks.arena.entries import BETWEEN, CALLS, ENTRIES, Ask, Entry, points
from benchmarks.arena.records import Record
from benchmarks.arena.scenes import MIXTURE, NAMES, Scene, of_points, scene
from benchmarks.arena.solvers import STARTS, asked
from fewstep.compare.table import Interval, interval, plain
from fewstep.plan.meta_step import size

TRIALS = 3
"""Of tuning, for everybody."""


def validated(record: Record, distance: str) -> float:
    """The distance that settings are chosen by; infinite where a trial failed."""
    return float(record["validation"].get(distance, math.inf))


def chosen(found: Sequence[Record], calls: int, distance: str, trials: int) -> int | None:
    """The best trial of tuning, by validation noise; None until all of them are done.

    Calls that are not tuned take that of four.
    """
    calls = 4 if calls in BETWEEN else calls
    tuned = {r["trial"]: r for r in found if r["calls"] == calls and r["seed"] == 0}
    if not set(range(trials)) <= tuned.keys():
        return None
    return min(range(trials), key=lambda trial: validated(tuned[trial], distance))


def tuned_equally(found: Sequence[Record], calls: int) -> int:
    """How many trials of tuning are there of all: every one, or the default alone."""
    have = {r["trial"] for r in found if r["calls"] == calls and r["seed"] == 0}
    return TRIALS if set(range(TRIALS)) <= have else min(1, len(have))


def span(values: Sequence[float]) -> dict[str, Any]:
    """Mean, interval and number."""
    of: Interval = interval(values)
    return {name: plain(value) for name, value in of._asdict().items()}


def needs(one: Entry, on: Scene) -> str:
    """What a method learns from: "data", "pairs" of its teacher, or "nothing" but the teacher."""
    method = one.make(Ask(one.calls[-1], points(one)[0].start, 90, on.labels))
    if method.needs_data:
        return "data"
    return "nothing" if method.needs_pairs() is None else "pairs"


def reached(record: Record, distance: str, mark: float) -> dict[str, float] | None:
    """Forwards and seconds at the first look that is at the mark; None where none is.

    Seconds are the forwards' share of the trial's.
    """
    looks = [(look["forwards"], look[distance]) for look in record["curve"]]
    looks.append((record["forwards"], record["test"].get(distance, math.inf)))
    for forwards, found in looks:
        if found <= mark:
            return {
                "forwards": forwards,
                "seconds": record["seconds"] * forwards / record["forwards"],
            }
    return None


def speed(runs: Sequence[Record], distance: str, mark: float) -> dict[str, Any]:
    """The mean forwards and seconds to a mark, where all runs reach it; else None."""
    hits = [reached(run, distance, mark) for run in runs]
    there = [hit for hit in hits if hit is not None]
    if not there or len(there) < len(hits):
        return {"forwards": None, "seconds": None, "reached": len(there)}
    mean = {key: statistics.fmean(hit[key] for hit in there) for key in ("forwards", "seconds")}
    return {**mean, "reached": len(there)}


def curve(runs: Sequence[Record], distance: str) -> list[list[float]]:
    """(forwards, distance) of the looks and of the end, means over seeds."""
    lines = []
    for run in runs:
        ends = [[look["forwards"], look[distance]] for look in run["curve"]]
        lines.append([*ends, [run["forwards"], run["test"][distance]]])
    return [
        [statistics.fmean(column) for column in zip(*place, strict=True)]
        for place in zip(*lines, strict=True)
    ]


def row(
    one: Entry, calls: int, found: Sequence[Record], on: Scene, marks: Mapping[str, float]
) -> dict[str, Any] | None:
    """The row of a method; None where it has no trial."""
    mine = [r for r in found if r["calls"] == calls]
    trials = tuned_equally(found, calls)
    best = chosen(found, calls, on.distance, trials) if trials else None
    if best is None:
        return None
    runs = sorted((r for r in mine if r["trial"] == best), key=lambda r: int(r["seed"]))
    whole = [r for r in runs if not r["failure"]]
    point = points(one)[best]
    tuning = [validated(r, on.distance) for r in mine if r["seed"] == 0 and r["trial"] < trials]
    worst, least = max(tuning), min(tuning)
    names = list(whole[0]["test"]) if whole else []
    last = marks[f"undistilled {calls}"]
    return {
        "name": one.name,
        "family": one.family,
        "needs": needs(one, on),
        "calls": calls,
        "tuned": trials,
        "trial": best,
        "setting": runs[0]["settings"]["method"],
        "lr": point.lr,
        "start": point.start,
        "seeds": len(runs),
        "scores": {name: span([r["test"][name] for r in whole]) for name in names},
        "each": {str(r["seed"]): plain(r["test"].get(on.distance, math.nan)) for r in runs},
        "sensitivity": plain(worst / least) if trials == TRIALS and least > 0 else None,
        "runs": len(mine),
        "diverged": sum(bool(r["failure"]) for r in mine),
        "worse": sum(not r["test"].get(on.distance, math.inf) < last for r in mine),
        "steps": runs[0]["settings"]["steps"],
        "forwards": runs[0]["forwards"],
        "seconds": statistics.fmean(r["seconds"] for r in runs),
        "peak": runs[0]["peak"],
        "copies": runs[0]["kept"] / size(on.model.build()),
        "speed": {name: speed(runs, on.distance, mark) for name, mark in marks.items()},
        "curve": curve(whole, on.distance) if whole else [],
    }


def by_calls(one: Entry, found: Sequence[Record], on: Scene) -> dict[str, Any] | None:
    """A method's distance by its calls; None where those that are tuned were conducted alone."""
    row: dict[str, Any] = {}
    for calls in sorted((*one.calls, *one.between)):
        best = chosen(found, calls, on.distance, TRIALS)
        runs = [r for r in found if (r["calls"], r["trial"]) == (calls, best)]
        if runs:
            values = [r["test"].get(on.distance, math.inf) for r in runs]
            row[str(calls)] = span(values if math.inf not in values else [])
    return {"name": one.name, "calls": row} if len(row) > len(CALLS) else None


def solvers(found: Sequence[Record], on: Scene) -> list[dict[str, Any]]:
    """The rows of the baselines, each with its best start."""
    rows = []
    for solver, calls in asked():
        mine = [r for r in found if (r["solver"], r["calls"]) == (solver, calls)]
        if not mine:
            continue
        best = min(mine, key=lambda r: validated(r, on.distance))
        rows.append(
            {
                "name": solver,
                "calls": calls,
                "made": best["made"],
                "tuned": len(mine),
                "start": STARTS[best["trial"]],
                "scores": best["test"],
            }
        )
    return rows


def best_at(rows: Sequence[Mapping[str, Any]], distance: str, calls: int) -> float:
    """The least distance of the teacher's solvers in so many calls; infinite where none is."""
    found = [
        row["scores"].get(distance, math.inf)
        for row in rows
        if row["calls"] == calls and row["name"] != "undistilled"
    ]
    return min(found, default=math.inf)


def marks_of(rows: Sequence[Mapping[str, Any]], distance: str) -> dict[str, float]:
    """The distances that a student may reach: its teacher's, and that of nothing taught."""
    found = {f"teacher {calls}": best_at(rows, distance, calls) for calls in (4, 8, 35)}
    for row in rows:
        if row["name"] == "undistilled":
            found[f"undistilled {row['calls']}"] = row["scores"].get(distance, math.inf)
    return found


def noise(found: Sequence[Record], distance: str) -> float | None:
    """Standard deviation of a distance between draws of noise, of students near the teacher.

    Of the same student on two draws, a half of the variance of the difference is that of one.
    """
    pairs = [(r["test"][distance], r["validation"][distance]) for r in found if r["validation"]]
    ordered = sorted(pairs)[: len(pairs) // 4]
    if len(ordered) < 2:
        return None
    return math.sqrt(statistics.fmean((a - b) ** 2 / 2 for a, b in ordered))


def ties(rows: list[dict[str, Any]]) -> None:
    """Mark the rows whose paired difference to the best of their calls is not clear."""
    for calls in {row["calls"] for row in rows}:
        group = [row for row in rows if row["calls"] == calls and row["each"]]
        best = group[0]
        for row in group:
            both = [seed for seed in row["each"] if seed in best["each"]]
            values = [(row["each"][seed], best["each"][seed]) for seed in both]
            gaps = [a - b for a, b in values if a is not None and b is not None]
            of = interval(gaps)
            row["tie"] = row is best or (of.n > 1 and not of.low > 0)


def exact(on: Scene, draws: int = 5) -> dict[str, Any] | None:
    """Scores of exact samples, as many as a student's: what no one can do better than."""
    if on.name != "mixture":
        return None
    generators = (torch.Generator().manual_seed(1000 + k) for k in range(draws))
    each = [of_points(MIXTURE.sample(on.samples, g), None) for g in generators]
    values = [one[on.distance] for one in each]
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values), "draws": draws}


def of_scene(on: Scene, folder: Path | None = None) -> dict[str, Any]:
    """All that a scene's records say."""
    plain_rows = solvers(records.read(on, "baselines", folder)["records"], on)
    marks = marks_of(plain_rows, on.distance)
    every: list[Record] = []
    rows, missing, lines = [], [], []
    for one in (one for one in ENTRIES if on.name in one.scenes):
        found = records.read(on, one.name, folder)["records"]
        every += found
        for calls in one.calls:
            made = row(one, calls, found, on, marks)
            if made is None:
                missing.append(f"{one.name} in {calls}")
            else:
                rows.append(made)
        lines.append(by_calls(one, found, on))
    rows.sort(key=lambda r: _order(r, on))
    ties(rows)
    codes = Counter(r["code"]["sha256"] for r in every)
    return {
        "distance": on.distance,
        "diversity": on.diversity,
        "budget": on.budget,
        "batch": on.batch,
        "samples": on.samples,
        "marks": {name: plain(value) for name, value in marks.items()},
        "exact": exact(on),
        "noise": noise(every, on.distance),
        "code": dict(codes),
        "trials": len(every),
        "failed": sum(bool(r["failure"]) for r in every),
        "minutes": sum(r["seconds"] for r in every) / 60,
        "longest": max((r["seconds"] for r in every), default=0.0),
        "baselines": plain_rows,
        "rows": rows,
        "by_calls": [line for line in lines if line is not None],
        "missing": missing,
    }


def _order(row: Mapping[str, Any], on: Scene) -> tuple[int, float]:
    mean = row["scores"].get(on.distance, {}).get("mean")
    return row["calls"], math.inf if mean is None else mean


def rounded(value: Any) -> Any:
    """Every float of a JSON value to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def summarise(folder: Path | None = None) -> dict[str, Any]:
    """The leaderboards of all scenes that have records."""
    there = [name for name in NAMES if ((folder or records.RESULTS) / name).is_dir()]
    found: dict[str, Any] = rounded({name: of_scene(scene(name), folder) for name in there})
    return found
