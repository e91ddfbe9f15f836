"""Draw the figures of docs/claims.md: python benchmarks/claims/figures.py

Reads benchmarks/results/claims/*.json, writes docs/images/claim-*.png and prints the tables.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from lab import RESULTS, ROOT

from fewstep.files import read_json

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


class Fit(NamedTuple):
    """ln(distance) = c - rate * x over all points: the rate, its standard error, R^2."""

    rate: float
    error: float
    r2: float


def fit(trials: Trials, distance: str, x: Callable[[float], float]) -> Fit:
    """Least squares of the logarithm of the distance against x(images)."""
    points = [(x(p["images"]), math.log(p[distance])) for t in trials for p in t["curve"]]
    xs, ys = zip(*points, strict=True)
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    sxx = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - b * (x - mx)) ** 2 for x, y in points)
    total = sum((y - my) ** 2 for y in ys)
    return Fit(-b, math.sqrt(rest / (len(xs) - 2) / sxx), 1 - rest / total)


def table(trials: Trials, scores: Sequence[str]) -> str:
    """Final scores as Markdown, mean and standard deviation over the seeds."""
    lines = ["| | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for label, runs in by_label(trials).items():
        cells = []
        for score in scores:
            mean, std = spread([final(run, score) for run in runs])
            cells.append(f"{mean:.3g} ± {std:.2g}" if math.isfinite(mean) else "diverged")
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {len(runs)} |")
    lines[0] += " seeds |"
    lines[1] += "---|"
    return "\n".join(lines)


def images_to(trial: Mapping[str, Any], distance: str, mark: float) -> float:
    """Pictures seen when the distance first is at the mark, between looks on a log-log line."""
    before: Mapping[str, float] | None = None
    for point in trial["curve"]:
        if point[distance] <= mark:
            if before is None:
                return float(point["images"])
            part = math.log(before[distance] / mark) / math.log(before[distance] / point[distance])
            span = math.log(point["images"] / before["images"])
            return float(before["images"] * math.exp(part * span))
        before = point
    return math.inf


def save(figure: Any, name: str) -> None:
    """Write docs/images/claim-NAME.png."""
    path = IMAGES / f"claim-{name}.png"
    figure.savefig(path)
    plt.close(figure)
    print(path.relative_to(ROOT))


SCORES = ("fd_{}", "precision", "recall", "nn", "accuracy")


def convergence(data: str, found: Mapping[str, Any], label: str) -> None:
    """Claim 1."""
    trials = by_label(found["trials"])[label]
    distance = f"fd_{data}"
    figure, ax = axes(f"SiD on {data}: distance while it learns", "pictures seen", distance)
    curves(ax, trials, distance, [label])
    anchor(ax, found["teacher"][distance])
    power, exponential = fit(trials, distance, math.log), fit(trials, distance, float)
    xs = [point["images"] for point in trials[0]["curve"]]
    middle = statistics.fmean(math.log(p[distance]) for t in trials for p in t["curve"])
    centre = statistics.fmean(map(math.log, xs))
    line = [math.exp(middle - power.rate * (math.log(x) - centre)) for x in xs]
    ax.plot(xs, line, ":", color="black", label=f"images^-{power.rate:.2f}")
    ax.legend(frameon=False)
    save(figure, f"{data}-convergence")
    print(f"power law: {power}\nexponential: {exponential}")
    print(table(trials, [score.format(data) for score in SCORES]))


def against(data: str, claim: str, found: Mapping[str, Any], title: str) -> None:
    """Curves of all labels of a claim, and their final scores."""
    distance = f"fd_{data}"
    labels = sorted(by_label(found["trials"]))
    figure, ax = axes(title, "pictures seen", distance)
    curves(ax, found["trials"], distance, labels)
    anchor(ax, found["teacher"][distance])
    ax.legend(frameon=False, fontsize=8)
    save(figure, f"{data}-{claim}")
    print(table(found["trials"], [score.format(data) for score in SCORES]))


def adversarial(data: str, found: Mapping[str, Any]) -> None:
    """Claim 3: the curves, and how many pictures SiDA needs for SiD's best."""
    against(data, "adversarial", found, f"SiD and SiDA on {data}")
    groups, distance = by_label(found["trials"]), f"fd_{data}"
    for label in groups:
        ratios = []
        for plain, other in zip(groups["SiD"], groups[label], strict=False):
            best = min(point[distance] for point in plain["curve"])
            mine = next(p["images"] for p in plain["curve"] if p[distance] == best)
            ratios.append(images_to(other, distance, best) / mine)
        print(f"{label}: pictures to SiD's best, as a share of SiD's: {ratios}")


def tradeoff(data: str, found: Mapping[str, Any]) -> None:
    """Claim 5: accuracy against recall, one point a guidance."""
    figure, ax = axes(f"Guidance on {data}", "label accuracy (alignment)", "recall (diversity)")
    for label, runs in by_label(found["trials"]).items():
        (x, dx), (y, dy) = (spread([final(r, s) for r in runs]) for s in ("accuracy", "recall"))
        if math.isfinite(x):
            ax.errorbar(x, y, dy, dx, "o", ms=5, capsize=2, color=COLOURS[0])
            ax.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    save(figure, f"{data}-guidance")
    print(table(found["trials"], [score.format(data) for score in SCORES]))


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
    print(table(found["trials"], [score.format(data) for score in SCORES]))


def presets(found: Mapping[str, Any]) -> None:
    """Every preset: its distance at the start and at the end."""
    for name, one in found.items():
        first, last = (one[when]["fd_digits"] for when in ("start", "end"))
        print(f"| {name} | {first:.3g} | {last:.3g} |")


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        data, _, claim = path.stem.partition("-")
        found = read_json(path)
        if claim == "presets":
            presets(found)
            continue
        print(f"\n## {path.stem}: teacher {found['teacher']}")
        if claim == "alpha":
            convergence(data, found, "alpha 1")
            sweep(data, found)
        elif claim == "adversarial":
            adversarial(data, found)
            if data == "mnist":
                convergence(data, found, "SiD")
        elif claim == "guidance":
            tradeoff(data, found)
        else:
            titles = {"steps": "Students of several calls", "distances": "SIM, two distances"}
            against(data, claim, found, f"{titles[claim]} on {data}")


if __name__ == "__main__":
    main()
