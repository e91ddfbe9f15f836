"""Draw the figures of docs/claims.md: python benchmarks/claims/figures.py

Reads benchmarks/results/claims/DATA-CLAIM.json, writes docs/images/claim-*.png.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import summary
from lab import ROOT
from summary import Trials, final, fit

matplotlib.use("agg")
import matplotlib.pyplot as plt

IMAGES = ROOT / "docs" / "images"
COLOURS = ("#2e6fb7", "#d9762b", "#3a9a5b", "#b5443c", "#7c5cb0", "#6b6b6b")


def by_label(trials: Trials) -> dict[str, list[Mapping[str, Any]]]:
    """The trials of each label, one a seed, in the order of the results."""
    return {label: [*runs.values()] for label, runs in summary.by_label(trials).items()}


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
        if not runs:
            continue
        images = [point["images"] for point in runs[0]]
        columns = list(zip(*([p[distance] for p in run] for run in runs), strict=True))
        means = [statistics.fmean(column) for column in columns]
        ax.plot(images, means, "o-", ms=3, color=colour, label=label)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        ax.fill_between(images, low, high, color=colour, alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log")


def anchor(ax: Any, value: float) -> None:
    """A line at the teacher's distance."""
    ax.axhline(value, color="black", lw=1, ls="--", label=f"teacher, {value:.3g}")


def save(figure: Any, name: str) -> None:
    """Write docs/images/claim-NAME.png."""
    path = IMAGES / f"claim-{name}.png"
    figure.savefig(path)
    plt.close(figure)
    print(path.relative_to(ROOT))


def convergence(data: str, found: Mapping[str, Any], label: str) -> None:
    """Claim 1."""
    trials = by_label(found["trials"])[label]
    distance = f"fd_{data}"
    figure, ax = axes(f"SiD on {data}: distance while it learns", "pictures seen", distance)
    curves(ax, trials, distance, [label])
    anchor(ax, found["teacher"][distance])
    slope = statistics.fmean(fit(trial, distance, math.log).slope for trial in trials)
    xs = [point["images"] for point in trials[0]["curve"]]
    middle = statistics.fmean(math.log(p[distance]) for t in trials for p in t["curve"])
    centre = statistics.fmean(map(math.log, xs))
    line = [math.exp(middle + slope * (math.log(x) - centre)) for x in xs]
    ax.plot(xs, line, ":", color="black", label=f"images^{slope:.2f}")
    ax.legend(frameon=False)
    save(figure, f"{data}-convergence")


def against(data: str, claim: str, found: Mapping[str, Any], title: str) -> None:
    """Curves of all labels of a claim, and their final scores."""
    distance = f"fd_{data}"
    labels = sorted(by_label(found["trials"]))
    figure, ax = axes(title, "pictures seen", distance)
    curves(ax, found["trials"], distance, labels)
    anchor(ax, found["teacher"][distance])
    ax.legend(frameon=False, fontsize=8)
    save(figure, f"{data}-{claim}")


def tradeoff(data: str, found: Mapping[str, Any]) -> None:
    """Claim 5: accuracy against recall, one point a guidance."""
    figure, ax = axes(f"Guidance on {data}", "label accuracy (alignment)", "recall (diversity)")
    for label, runs in by_label(found["trials"]).items():
        (x, dx), (y, dy) = (spread([final(r, s) for r in runs]) for s in ("accuracy", "recall"))
        if math.isfinite(x):
            ax.errorbar(x, y, dy, dx, "o", ms=5, capsize=2, color=COLOURS[0])
            ax.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    save(figure, f"{data}-guidance")


def sweep(data: str, found: Mapping[str, Any]) -> None:
    """Claim 2: the final distance against alpha."""
    figure, ax = axes(f"SiD on {data}: which alpha", "alpha", f"fd_{data} at the end")
    for label, runs in sorted(by_label(found["trials"]).items()):
        values = [final(run, f"fd_{data}") for run in runs]
        x = float(label.split()[1])
        ax.plot([x] * len(values), values, "o", color=COLOURS[0], alpha=0.6)
        ax.plot(x, statistics.fmean(values), "_", ms=18, color="black")
    anchor(ax, found["teacher"][f"fd_{data}"])
    ax.set(yscale="log")
    ax.legend(frameon=False)
    save(figure, f"{data}-alpha")


TITLES = {
    "adversarial": "SiD and SiDA",
    "steps": "Students of several calls",
    "distances": "SIM, two distances",
}


def main() -> None:
    for stem, found in summary.read().items():
        data, _, claim = stem.partition("-")
        if claim == "alpha":
            convergence(data, found, "alpha 1")
            sweep(data, found)
        elif claim == "guidance":
            tradeoff(data, found)
        else:
            against(data, claim, found, f"{TITLES[claim]} on {data}")
        if stem == "mnist-adversarial":
            convergence(data, found, "SiD")


if __name__ == "__main__":
    main()
