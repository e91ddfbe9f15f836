"""What the trials say, paired by seed: python benchmarks/claims/summary.py

Trials of one seed share their noise, their batches and their teacher, so two settings are compared
seed by seed: the mean of the differences, Student's 95 % interval for it, and t. A comparison is
`clear` if the interval leaves out zero. No correction is made for the number of comparisons.

Reads benchmarks/results/claims/DATA-CLAIM.json, writes benchmarks/results/claims/summary.json,
whose fields are the figures of docs/claims.md (see benchmarks/pages.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lab import RESULTS, ROOT
from scipy.stats import t as student_t

from fewstep.storage.files import read_json, write_json

OUT = RESULTS / "summary.json"
Trial = Mapping[str, Any]
Trials = Sequence[Trial]


class Interval(NamedTuple):
    """A mean over seeds, Student's 95 % interval for it, and t against zero.

    One seed has neither interval nor t, and is never clear; nor have values that are all alike t.
    """

    mean: float
    low: float | None
    high: float | None
    t: float | None
    n: int
    clear: bool


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed."""
    n = len(values)
    if n < 2:
        return Interval(statistics.fmean(values), None, None, None, n, False)
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    half = float(student_t.ppf(0.975, n - 1)) * error
    low, high = mean - half, mean + half
    return Interval(mean, low, high, mean / error if error else None, n, low > 0 or high < 0)


def by_label(trials: Trials) -> dict[str, dict[int, Trial]]:
    """label -> seed -> trial, in the order of the results."""
    found: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        found.setdefault(trial["label"], {})[trial["seed"]] = trial
    return found


def final(trial: Trial, score: str) -> float:
    """A score of the finished student on the noise that is reported; infinite if it diverged.

    `validation/SCORE` reads the noise that settings are chosen on, which no report may.
    """
    if trial["failure"]:
        return math.inf
    group, _, name = score.rpartition("/")
    if group or name == "alignment":
        return float(trial[group or "report"][name])
    return float(trial["curve"][-1][name])


def paired(trials: Trials, a: str, b: str, score: Callable[[Trial], float]) -> Interval:
    """`score` of the trials labelled a less that of those labelled b, seed by seed."""
    groups = by_label(trials)
    for label in (a, b):
        if label not in groups:
            raise ValueError(f"no trial is labelled {label!r}; there are {', '.join(groups)}")
    seeds = sorted(groups[a].keys() & groups[b].keys())
    if not seeds:
        raise ValueError(f"{a!r} and {b!r} have no seed in common")
    differences = [score(groups[a][seed]) - score(groups[b][seed]) for seed in seeds]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"{a!r} or {b!r} diverged with some seed; differences say nothing")
    return interval(differences)


class Line(NamedTuple):
    """ln(distance) = c + slope * x over the looks of one trial, and R^2."""

    slope: float
    r2: float


def fit(trial: Trial, distance: str, x: Callable[[float], float]) -> Line:
    """Least squares of the logarithm of the distance against x(pictures seen)."""
    xs = [x(point["images"]) for point in trial["curve"]]
    ys = [math.log(point[distance]) for point in trial["curve"]]
    slope = statistics.linear_regression(xs, ys).slope
    return Line(slope, statistics.correlation(xs, ys) ** 2)


def images_to(trial: Trial, distance: str, mark: float) -> float:
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


def shares(trials: Trials, a: str, b: str, distance: str) -> list[float]:
    """Pictures that a needs for b's best distance, as a share of b's, seed by seed."""
    groups, found = by_label(trials), []
    for seed in sorted(groups[a].keys() & groups[b].keys()):
        curve = groups[b][seed]["curve"]
        best = min(curve, key=lambda point: point[distance])
        found.append(images_to(groups[a][seed], distance, best[distance]) / best["images"])
    return found


def scores(trials: Trials) -> dict[str, Any]:
    """label -> score -> mean and standard deviation over the seeds, and how many they are.

    Diverged trials are counted, and are in no mean.
    """
    table: dict[str, Any] = {}
    for label, runs in by_label(trials).items():
        whole = [trial for trial in runs.values() if not trial["failure"]]
        row: dict[str, Any] = {"seeds": len(runs), "diverged": len(runs) - len(whole)}
        names = [name for name in (whole[0]["curve"][-1] if whole else ()) if name != "step"]
        if whole and all("report" in trial for trial in whole):
            names += ["alignment", "validation/alignment"]
        for name in names:
            values = [final(trial, name) for trial in whole]
            row[name] = {"mean": statistics.fmean(values)}
            if len(values) > 1:
                row[name]["std"] = statistics.stdev(values)
        table[label] = row
    return table


def at_equal_alignment(trials: Trials, other: str) -> dict[str, Any]:
    """LSG against another guidance where LSG is at least as aligned, at the smallest such scale.

    The scale is chosen by the mean alignment on the validation noise, no guidance being scale 1,
    among those that have all seeds of the other; the differences (other less LSG) are those of the
    noise that is reported.
    """
    trials = [trial for trial in trials if "validation" in trial]
    groups = by_label(trials)
    if other not in groups:
        raise ValueError(f"no trial of {other!r} was scored on the validation noise")
    seeds = groups[other].keys()

    def chosen_on(label: str) -> float:
        return statistics.fmean(final(groups[label][s], "validation/alignment") for s in seeds)

    scales = {label: float(label.split()[1]) for label in groups if label.startswith("LSG ")}
    grid = {
        scale: label
        for label, scale in ({"Unguided": 1.0} | scales).items()
        if seeds <= groups.get(label, {}).keys()
    }
    enough = [scale for scale in sorted(grid) if chosen_on(grid[scale]) >= chosen_on(other)]
    if not enough:
        raise ValueError(f"no scale of LSG is as aligned as {other}; add larger ones")
    label = grid[enough[0]]
    names = ("fd_digits", "precision", "recall", "alignment")
    rows = {name: difference(trials, other, label, name) for name in names}
    return {"lsg": label, "scale": enough[0], "grid": sorted(grid), **rows}


def difference(trials: Trials, a: str, b: str, name: str) -> dict[str, Any]:
    """`paired` of a score, as a row of the results."""
    return paired(trials, a, b, lambda trial: final(trial, name))._asdict()


def differences(trials: Trials, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """ "a - b" -> score -> the paired difference."""
    names = ("fd_digits", "precision", "recall", "accuracy")
    return {
        f"{a} - {b}": {name: difference(trials, a, b, name) for name in names} for a, b in pairs
    }


def of_labels(trials: Trials, prefix: str, base: str) -> list[tuple[str, str]]:
    """Every label of a prefix against one of them, but those that diverged."""
    return [
        (label, base)
        for label, runs in by_label(trials).items()
        if label.startswith(prefix)
        and label != base
        and not any(t["failure"] for t in runs.values())
    ]


def convergence(trials: Trials) -> dict[str, Any]:
    """Claim 1: how straight ln(distance) is against ln(pictures), and against pictures."""
    logarithmic = [fit(trial, "fd_digits", math.log) for trial in trials]
    linear = [fit(trial, "fd_digits", float) for trial in trials]
    return {
        "slope": interval([line.slope for line in logarithmic])._asdict(),
        "r2": {"mean": statistics.fmean(line.r2 for line in logarithmic)},
        "r2_against_pictures": {"mean": statistics.fmean(line.r2 for line in linear)},
        "r2_gain": interval(
            [a.r2 - b.r2 for a, b in zip(logarithmic, linear, strict=True)]
        )._asdict(),
    }


def distances(trials: Trials) -> dict[str, Any]:
    """Claim 4: pseudo-Huber less squared L2 at each rate that both survive."""
    rates = list(dict.fromkeys(trial["label"].split("lr ")[1] for trial in trials))
    pairs = [(f"pseudo-Huber, lr {rate}", f"squared L2, lr {rate}") for rate in rates]
    lost = {trial["label"] for trial in trials if trial["failure"]}
    return differences(trials, [pair for pair in pairs if not lost & {*pair}])


def compared(claims: Mapping[str, Trials]) -> dict[str, Any]:
    """All comparisons on digits, by claim."""
    steps, sida = claims["steps"], claims["adversarial"]
    fast = "1 call, lr 0.002"  # one call at the rate of the recipe, for as many steps
    again = [{**t, "label": fast} for t in claims["guidance"] if t["label"] == "Unguided"]
    plain = [trial for trial in claims["alpha"] if trial["label"] == "alpha 1"]
    return {
        "convergence": convergence(plain),
        "alpha": differences(claims["alpha"], of_labels(claims["alpha"], "alpha", "alpha 1")),
        "adversarial": differences(sida, of_labels(sida, "SiDA", "SiD"))
        | {
            "pictures": {
                "each": (each := shares(sida, "SiDA", "SiD", "fd_digits")),
                **interval(each)._asdict(),
            },
            "nearest": difference(sida, "SiDA, 5 % of the data", "SiD", "nn"),
        },
        "distances": distances(claims["distances"]),
        "steps": differences(
            steps,
            (
                *((f"{n} calls, uniform", f"{n} calls, final") for n in (2, 4)),
                *((f"{n} calls, {m}", "1 call") for n in (2, 4) for m in ("uniform", "final")),
            ),
        )
        | differences([*steps, *again], [("4 calls, final, lr 0.002", fast)]),
        "guidance": {
            other: at_equal_alignment(claims["guidance"], other)
            for other in ("AntiCFG -1", "AntiCFG -0.5", "ZeroCFG")
        }
        | differences(
            claims["guidance"],
            [(each, "Unguided") for each in ("AntiCFG -0.5", "AntiCFG -1", "ZeroCFG")],
        ),
    }


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything, from the contents of DATA-CLAIM.json by their stems."""
    tables: dict[str, Any] = {"digits": {}, "mnist": {}}
    claims: dict[str, Trials] = {}
    for stem, found in results.items():
        data, _, claim = stem.partition("-")
        tables[data][claim] = scores(found["trials"])
        tables[data]["teacher"] = found["teacher"]
        if data == "digits":
            claims[claim] = found["trials"]
    mnist = results["mnist-adversarial"]["trials"][0]
    line = fit(mnist, "fd_mnist", math.log)._asdict()
    return {**tables, "differences": compared(claims), "mnist_convergence": line}


def rounded(tree: Any) -> Any:
    """Six digits of every number."""
    if isinstance(tree, Mapping):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


def read() -> dict[str, Mapping[str, Any]]:
    """The results that hold trials, by the stem of their file."""
    found = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*-*.json"))}
    return {stem: content for stem, content in found.items() if "trials" in content}


if __name__ == "__main__":
    write_json(OUT, rounded(summarise(read())))
    print(OUT.relative_to(ROOT))
