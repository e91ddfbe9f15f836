"""Tables of the page: measurements, gauges, configuration, environment."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.config import encode
from fewstep.eval.metric_table import METRICS, metric
from fewstep.recipes.registry import every
from fewstep.report.formatting import BETTER, NONE, short
from fewstep.report.repeats import spread
from fewstep.report.run_data import RunData, number, on_prompts
from fewstep.storage.files import read_json

ROLES = ("real", "teacher", "student")


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, and as it is stored."""

    text: str
    exact: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Metric:
    """One row of the measurements."""

    name: str
    cells: list[Cell]
    meaning: str
    better: str


@dataclass(frozen=True)
class Evaluation:
    """A result of `fewstep evaluate --protocol` or `--prompts`: a row a score, a column a run."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str


@dataclass(frozen=True)
class Setting:
    """One line of the configuration."""

    depth: int
    name: str
    flag: str
    value: str
    recipe: str = ""
    """The recipe's value, where it is another."""


def roles(f: RunData) -> list[str]:
    """The columns of the measurements."""
    shown = [role for role in ROLES if role in f.metrics]
    return [*shown, "seeds"] if f.repeats and shown else shown


def metrics(f: RunData) -> list[Metric]:
    """One row a metric: the distance first, then the known ones, then others."""
    present = dict.fromkeys(
        name
        for scores in f.metrics.values()
        for name in scores
        if not name.endswith("_std") and name != "draws"
    )
    first = [name for name in (f.distance, *METRICS) if name in present]
    rows = []
    for name in [*first, *(n for n in present if n not in first)]:
        known = metric(name, f.distance)
        cells = [_cell(f.metrics[role], role, name) for role in ROLES if role in f.metrics]
        if f.repeats:
            cells.append(_over_seeds(f, name))
        rows.append(Metric(name, cells, known.meaning, BETTER[known.better]))
    return rows


def _cell(scores: Mapping[str, float], role: str, name: str) -> Cell:
    value, spread = number(scores, name), number(scores, f"{name}_std")
    if math.isnan(value) or (role == "real" and name in ("calls", "ms_per_image")):
        return Cell(NONE)
    text = f"{value:,.0f}" if name == "calls" else short(value)
    return Cell(text, repr(value), f"± {short(spread, 2)}" if spread > 0 else "")


def _over_seeds(f: RunData, name: str) -> Cell:
    """Mean and deviation of a score over the seeds of the run."""
    found = spread(f, name)
    if found.n < 2:
        return Cell(NONE)
    text = f"{found.mean:,.0f}" if name == "calls" else short(found.mean)
    return Cell(text, repr(found.mean), f"± {short(found.deviation, 2)}, n = {found.n}")


def downloads(f: RunData) -> list[tuple[str, str]]:
    """The scores as files: (name, data URI); none where nothing was measured.

    A line of the CSV is role, metric, value, and standard deviation where there is one.
    """
    if not f.metrics:
        return []
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["role", "metric", "value", "std"])
    for role, scores in f.metrics.items():
        for name, value in scores.items():
            if not name.endswith("_std"):
                spread = scores.get(f"{name}_std", "")
                lines.writerow([role, name, repr(value), spread and repr(spread)])
    whole = {
        role: {name: value if math.isfinite(value) else None for name, value in scores.items()}
        for role, scores in f.metrics.items()
    }
    stored = json.dumps({"protocol": f.protocol, **whole}, indent=2)
    texts = {"scores.csv": ("text/csv", out.getvalue())}
    texts["scores.json"] = ("application/json", stored)
    return [
        (name, f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}")
        for name, (kind, text) in texts.items()
    ]


def evaluations(f: RunData) -> list[Evaluation]:
    """Every result that is stored; what may be called an FID, `fewstep.eval.features` says."""
    results = []
    for file, stored in f.evaluations.items():
        title = f"As papers report it: {file}"
        if on_prompts(file):
            title = f"On prompts: {file.removeprefix('prompts-')}"
        note = ""
        if not f.still(stored):
            note = " Measured on another model than the one that is in this folder now."
        results.append(_evaluation(title, stored, note))
    for file, stored in f.beside.items():
        title = f"The teacher on the same prompts: {file.removeprefix('prompts-')}"
        results.append(_evaluation(title, stored))
    return results


def _evaluation(title: str, stored: Mapping[str, Any], more: str = "") -> Evaluation:
    """A column a run, the best and the mean."""
    runs, reference = stored["runs"], stored["reference"]
    parts = {f"run {i}": run for i, run in enumerate(runs)}
    parts |= {"best": stored["best"], "mean": stored["mean"]}
    rows = []
    for name in map(str, stored["best"]):
        cells = [_cell(scores, "", name) for scores in parts.values()]
        spread = number(stored["std"], name)
        if spread > 0:
            cells[-1] = replace(cells[-1], spread=f"± {short(spread, 2)}")
        rows.append((name, cells))
    labels = str(stored.get("labels"))
    prompts = labels.removeprefix("prompts of ")
    note = f"Labels: {labels}. " if prompts == labels else f"Prompts: {prompts}. "
    if (scale := number(stored, "guidance")) == scale and scale != 1:
        note += f"Guided at scale {short(scale)}. "
    if sampler := stored.get("sampler"):
        note += f"Sampled by {sampler}. "
    if reference:
        note += (
            f"Reference: {reference.get('file')}, "
            f"{reference.get('pictures') or 'an unknown number of'} pictures, SHA-256 "
            f"{str(reference.get('sha256'))[:16]}. "
        )
    if (spread := number(stored, "diversity")) == spread:
        note += f"Diversity of a prompt's pictures: {short(spread)}. "
    note += f"The best run is run {stored.get('best run')}."
    return Evaluation(title, list(parts), rows, note + more)


def levels(f: RunData) -> list[list[str]]:
    """The last look by noise level: t, Fisher, fake score's error, teacher's error, ratio."""
    rows = []
    for level in f.levels(f.last):
        fake, teacher = number(level, "fake_error"), number(level, "teacher_error")
        ratio = fake / teacher if teacher > 0 else math.nan
        values = (number(level, "t"), number(level, "fisher"), fake, teacher, ratio)
        rows.append([short(value) for value in values])
    return rows


def settings(f: RunData) -> list[Setting]:
    """Every field of the run, beside the recipe's value where that is another."""
    recipe = every().get(str(f.facts.get("recipe")))
    usual = dict(flat(encode(recipe()))) if recipe else {}
    rows = []
    for flag, value in flat(f.run):
        before = usual.get(flag, value)
        other = before if before != value else ""
        rows.append(Setting(flag.count("."), flag.rpartition(".")[2], flag, value, other))
    return rows


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, value as text), a configuration before its fields."""
    for name, value in tree.items():
        if name == "type":
            continue
        if isinstance(value, Mapping):
            yield f"{prefix}{name}", str(value.get("type", ""))
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def commands(f: RunData) -> list[str]:
    """The commands that made the run, its teacher's first."""
    out = []
    where = f.facts.get("teacher")
    if where and (Path(where) / "run.json").is_file():
        facts = read_json(Path(where) / "run.json")
        out.append(str(facts.get("command", "")) if isinstance(facts, dict) else "")
    out.append(str(f.facts.get("command", "")))
    return list(dict.fromkeys(filter(None, out)))


def environment(f: RunData) -> list[tuple[str, str]]:
    """Versions and machine."""
    stored = f.facts.get("environment")
    pairs = stored.items() if isinstance(stored, Mapping) else ()
    return [(str(name), str(value)) for name, value in pairs]


def digests(f: RunData) -> list[tuple[str, str]]:
    """File and SHA-256 of the finished model."""
    if not f.finished:
        return []
    manifest = read_json(f.path / "student" / "manifest.json")
    return [(str(name), str(value)) for name, value in manifest.get("sha256", {}).items()]
