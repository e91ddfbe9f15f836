"""Draw the figures of docs/claims.md: python benchmarks/claims/figures.py

Reads benchmarks/results/claims/*.json, writes docs/images/claim-*.png and prints the tables.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from lab import ROOT

matplotlib.use("agg")
import matplotlib.pyplot as plt

IMAGES = ROOT / "docs" / "images"
COLOURS = ("#2e6fb7", "#d9762b", "#3a9a5b", "#b5443c", "#7c5cb0", "#6b6b6b")
Trials = Sequence[Mapping[str, Any]]


def by_label(trials: Trials) -> dict[str, list[Mapping[str, Any]]]:
    """The trials of each label, one a seed, in the order of the results."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for trial in trials:
        found[trial["label"]].append(trial)
    return dict(found)


def final(trial: Mapping[str, Any], score: str) -> float:
    """A score at the end; infinite for a trial that diverged."""
    return math.inf if trial["failure"] else float(trial["curve"][-1][score])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure, ax = plt.subplots(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return figure, ax


def curves(ax: Any, trials: Trials, distance: str, labels: Sequence[str]) -> None:
    """Distance against pictures seen, mean and range over seeds, both axes logarithmic."""
    groups = by_label(trials)
    for colour, label in zip(COLOURS, labels, strict=False):
        runs = [t["curve"] for t in groups[label] if not t["failure"]]
        images = [point["images"] for point in runs[0]]
        columns = list(zip(*([p[distance] for p in run] for run in runs), strict=True))
        ax.plot(
            images, [statistics.fmean(c) for c in columns], "o-", ms=3, color=colour, label=label
        )
        ax.fill_between(
            images,
            *zip(*((min(c), max(c)) for c in columns), strict=True),
            color=colour,
            alpha=0.15,
        )
    ax.set(xscale="log", yscale="log")


def slope(trials: Trials, distance: str) -> tuple[float, float, float]:
    """Fit ln(distance) = c - b ln(images) over all points: b, its standard error, R^2."""
    points = [(math.log(p["images"]), math.log(p[distance])) for t in trials for p in t["curve"]]
    xs, ys = zip(*points, strict=True)
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    sxx = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - b * (x - mx)) ** 2 for x, y in points)
    total = sum((y - my) ** 2 for y in ys)
    return -b, math.sqrt(rest / (len(xs) - 2) / sxx), 1 - rest / total


def table(trials: Trials, scores: Sequence[str]) -> str:
    """Final scores as Markdown, mean and standard deviation over the seeds."""
    lines = ["| | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for label, runs in by_label(trials).items():
        cells = []
        for score in scores:
            mean, std = spread([final(run, score) for run in runs])
            cells.append(f"{mean:.3g} +- {std:.2g}" if math.isfinite(mean) else "diverged")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
