"""The arena's pages and pictures, made of its leaderboard: python -m benchmarks.arena page

    benchmarks/results/arena/summary.json   every figure of the pages
    docs/arena.md, docs/choosing.md         the pages
    docs/images/arena-*.svg                 the pictures, light and dark
    runs/arena/index.html                   both pages and pictures as one file
    fewstep/recipes/choices.json            what `fewstep recipes --for` reads

A figure of a page is a field of the summary, written by `figure` and its kin; the prose here holds
none but settings. tests/test_arena.py renders the pages again and compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.arena import leaderboard, records
from benchmarks.arena.entries import ABSENT, ENTRIES, SPACES, unmeasured
from benchmarks.arena.html_page import page
from benchmarks.arena.scenes import NAMES, ROOT
from fewstep.recipes.choosing import FROM, SHOWN, Wish, answer, largest
from fewstep.report.svg_chart import Anchor, Axis, Chart, Series, chart
from fewstep.storage.files import read_json, write, write_json

SUMMARY = records.RESULTS / "summary.json"
CHOICES = ROOT / "fewstep" / "recipes" / "choices.json"
TEMPLATES = Path(__file__).parent / "templates"
IMAGES = ROOT / "docs" / "images"
Row = Mapping[str, Any]
TITLES = {
    "mixture": "A mixture in the plane",
    "digits": "8x8 digits",
    "mnist": "MNIST at 16x16",
}
WHAT = {
    "mixture": "five unequal Gaussians in the plane, known exactly; its teacher is a small MLP "
    "that was fitted to samples of it",
    "digits": "8x8 handwritten digits with labels; its teacher is the one of the recipe "
    "`digits_teacher`, a tenth of whose labels are dropped",
    "mnist": "MNIST at 16x16 with labels, from a copy of one's own (`FEWSTEP_MNIST`); its teacher "
    "is the convolutional one of [the assets](../benchmarks/assets/README.md)",
}
MEASURE = {
    "mixture": "the energy distance to the mixture itself, without reference samples, in "
    "thousandths (zero for exact samples in the mean)",
    "digits": "`fd_digits`, a Frechet distance in the features of a digit classifier",
    "mnist": "`fd_mnist`, a Frechet distance in the features of a classifier of MNIST",
}
NONE = "-"
UNMEASURED = "has not been measured yet."
UNIT = {"mixture": 1000.0, "digits": 1.0, "mnist": 1.0}
"""What a distance is multiplied by in tables."""
INKS = {
    "score identity": "student",
    "divergences": "real",
    "adversaries": "teacher",
    "trajectories": "fourth",
    "schedules": "level8",
}
"""The colour of a family."""


class Table(NamedTuple):
    """Headings, and rows of text; the first column names."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def figure(value: float | None, digits: int = 3) -> str:
    """A number of the summary, with so many digits that matter; a dash where there is none."""
    if value is None:
        return NONE
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text else text


def interval(of: Mapping[str, Any], unit: float) -> str:
    """A mean with its interval."""
    if of["mean"] is None:
        return NONE
    if of["low"] is None:
        return figure(of["mean"] * unit)
    return (
        f"{figure(of['mean'] * unit)} ({figure(of['low'] * unit)} to {figure(of['high'] * unit)})"
    )


def leaders(scene: str, data: Row, calls: int) -> Table:
    """The leaderboard of a number of calls."""
    unit, more = UNIT[scene], ("spread", "least_mode")
    if scene != "mixture":
        more = ("precision", "recall")
    heads = [
        "place",
        "method",
        "learns from",
        "distance",
        *(name.replace("_", " ") for name in more),
    ]
    heads += ["tuning", "failed", "steps", "F", "CPU s", "weights"]
    rows = []
    for place, row in enumerate((r for r in data["rows"] if r["calls"] == calls), 1):
        scores = row["scores"]
        known = scores.get(data["distance"])
        cells = [f"{place}{'=' if row['tie'] and place > 1 else ''}", f"`{row['name']}`"]
        cells += [row["needs"], "diverged" if known is None else interval(known, unit)]
        cells += [figure(scores.get(name, {}).get("mean")) for name in more]
        cells += [figure(row["sensitivity"], 2), f"{failed(row)} of {row['runs']}"]
        cells += [f"{row['steps']:,}", f"{row['forwards'] / 1000:,.0f}k"]
        cells += [figure(row["seconds"], 2), figure(row["copies"], 2)]
        rows.append(cells)
    return Table(heads, rows)


def failed(row: Row) -> int:
    """Trials that diverged, or ended no nearer than a student that nothing was taught."""
    return int(row["worse"])


def references(scene: str, data: Row) -> Table:
    """What the teacher gives: solvers by calls."""
    names = list(dict.fromkeys(row["name"] for row in data["baselines"]))
    calls = sorted({row["calls"] for row in data["baselines"]})
    cells = {(row["name"], row["calls"]): row for row in data["baselines"]}
    rows = []
    for name in names:
        line = [name]
        for count in calls:
            row = cells.get((name, count))
            known = None if row is None else row["scores"].get(data["distance"])
            line.append(
                "" if row is None else figure(None if known is None else known * UNIT[scene])
            )
        rows.append(line)
    return Table(
        ["solver", *(f"{count} calls" if count > 1 else "1 call" for count in calls)], rows
    )


def by_calls(scene: str, data: Row) -> Table:
    """Distances by number of calls, of methods that are free in it; `!` where DDIM does better.

    That is the teacher's DDIM in twice the calls.
    """
    unit, key = UNIT[scene], data["distance"]
    ddim = {r["calls"]: r["scores"].get(key) for r in data["baselines"] if r["name"] == "DDIM"}
    none = {
        r["calls"]: r["scores"].get(key) for r in data["baselines"] if r["name"] == "undistilled"
    }
    columns = sorted({int(calls) for row in data["by_calls"] for calls in row["calls"]})
    heads = ["method", *(f"{n} calls" if n > 1 else "1 call" for n in columns)]
    rows = [
        ["DDIM in twice the calls", *(scaled(ddim.get(2 * n), unit) for n in columns)],
        ["undistilled", *(scaled(none.get(n), unit) for n in columns)],
    ]
    for row in sorted(data["by_calls"], key=lambda row: str(row["name"]).lower()):
        cells = [f"`{row['name']}`"]
        for n in columns:
            of, bar = row["calls"].get(str(n), {"mean": None}), ddim.get(2 * n)
            worse = of["mean"] is not None and bar is not None and of["mean"] > bar
            cells.append(interval(of, unit) + " !" * worse)
        rows.append(cells)
    return Table(heads, rows)


def scaled(value: float | None, unit: float) -> str:
    """A distance in the unit of its table."""
    return figure(None if value is None else value * unit)


MARKS = ("teacher 4", "teacher 8", "teacher 35")


def speeds(data: Row, calls: int) -> Table:
    """Forwards and seconds to the teacher's distances, of the methods that reach the first."""
    heads = ["method"]
    for mark in MARKS:
        heads += [f"as {mark.split()[1]} calls: F", "CPU s"]
    rows = []
    for row in (r for r in data["rows"] if r["calls"] == calls):
        to = row["speed"]
        if to[MARKS[0]]["forwards"] is None:
            continue
        line = [f"`{row['name']}`"]
        for mark in MARKS:
            line += [whole(to[mark]["forwards"]), figure(to[mark]["seconds"], 2)]
        rows.append((to[MARKS[0]]["forwards"], line))
    return Table(heads, [line for _, line in sorted(rows, key=lambda pair: pair[0])])


def whole(value: float | None) -> str:
    """A number of forwards."""
    return NONE if value is None else f"{float(f'{value:.3g}'):,.0f}"


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranks(scene: str, data: Row, calls: int) -> Chart | None:
    """Distance against place, with intervals, by family; the teacher as lines."""
    rows = [r for r in data["rows"] if r["calls"] == calls and r["scores"]]
    series = []
    for family, ink in INKS.items():
        mine = [(k, r) for k, r in enumerate(rows, 1) if r["family"] == family]
        means = [r["scores"][data["distance"]] for _, r in mine]
        xs, ys = [float(k) for k, _ in mine], [of["mean"] for of in means]
        series.append(Series(xs, ys, family, ink, "", marker="o"))
        for x, of in zip(xs, means, strict=True):
            if of["low"] is not None:
                low = max(of["low"], of["mean"] / 10)
                series.append(Series([x, x], [low, of["high"]], "", ink, "-", 1.0, 0.6))
    marks = data["marks"]
    dashes = {"teacher 4": ":", "teacher 8": "-.", "teacher 35": "--"}
    anchors = [
        Anchor(marks[name] or 0, f"{name} calls", "muted", dash) for name, dash in dashes.items()
    ]
    title = f"{'One call' if calls == 1 else 'Four calls'}: every method by its distance"
    key = f"{scene[0]}r{calls}"
    return chart(key, title, series, Axis("place"), Axis("distance", log=True), anchors=anchors)


def compute(scene: str, data: Row, calls: int) -> Chart | None:
    """Distance against forward passes, of the best two of each family."""
    series = []
    for family, ink in INKS.items():
        mine = [r for r in data["rows"] if (r["calls"], r["family"]) == (calls, family)]
        for row, dash in zip([r for r in mine if r["curve"]][:2], ("-", "--"), strict=False):
            xs, ys = zip(*row["curve"], strict=True)
            series.append(Series(xs, ys, row["name"], ink, dash, marker="o"))
    title = f"{'One call' if calls == 1 else 'Four calls'}: quality against compute"
    x = Axis("forward passes of the teacher's network", log=True)
    return chart(f"{scene[0]}c{calls}", title, series, x, Axis("distance", log=True))


def pictures(summary: Row) -> dict[str, Chart]:
    """The charts by the names of their files."""
    found = {}
    for scene, data in summary.items():
        for calls in sorted({row["calls"] for row in data["rows"]}):
            for kind, make in (("ranks", ranks), ("compute", compute)):
                one = make(scene, data, calls)
                if one is not None:
                    found[f"arena-{scene}-{kind}-{calls}.svg"] = one
    return found


def style() -> str:
    """The report's colours, light and dark."""
    text = (files("fewstep.report") / "style.css").read_text(encoding="utf-8")
    return text[: text.index("* {")]


def standalone(one: Chart) -> str:
    """A chart as a file of its own, on its own ground."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = str(one.svg).replace("<svg ", f"<svg {spaces} ", 1)
    ground = "svg { background: var(--card); font-family: system-ui, sans-serif; }"
    return text.replace(">", f"><style>{style()}{ground}</style>", 1) + "\n"


def several(values: Sequence[int], noun: str) -> str:
    """ "1 seed", "1 or 3 seeds"."""
    return f"{' or '.join(map(str, values))} {noun}{'s' if max(values, default=0) > 1 else ''}"


def ran(scene: str, data: Row) -> str:
    """What was run, counted."""
    seeds = sorted({row["seeds"] for row in data["rows"]})
    tuned = sorted({row["tuned"] for row in data["rows"]})
    lines = [
        f"{data['trials']} trials of {len({r['name'] for r in data['rows']})} methods, "
        f"{figure(data['minutes'])} CPU minutes of training on one core in all, the longest "
        f"{figure(data['longest'])} s; {several(tuned, 'trial')} of tuning and "
        f"{several(seeds, 'seed')} each. The budget is {data['budget']:,} F in batches of "
        f"{data['batch']}, and a finished student is measured by {data['samples']:,} samples."
    ]
    failed_ = data["failed"]
    lines.append(
        f"{failed_} trials were not finite." if failed_ else "No trial became other than finite."
    )
    short = [f"`{r['name']}` in {r['calls']}" for r in data["rows"] if r["seeds"] < max(seeds)]
    if short:
        lines.append(f"Fewer seeds than others have: {', '.join(short)}.")
    if data["missing"]:
        lines.append(f"Not run yet: {', '.join(data['missing'])}.")
    codes = ", ".join(f"{sha} ({count})" for sha, count in data["code"].items())
    lines.append(f"Code that made them, by SHA-256: {codes}.")
    return " ".join(lines)


def of_scene(scene: str, data: Row) -> str:
    """The section of a scene."""
    parts = [f"## {TITLES[scene]}", f"The law is {WHAT[scene]}. The distance is {MEASURE[scene]}."]
    parts.append(ran(scene, data))
    unit = UNIT[scene]
    if data["exact"]:
        parts.append(
            f"Exact samples are {figure(data['exact']['mean'] * unit, 2)} ± "
            f"{figure(data['exact']['std'] * unit, 2)} away. Another draw of noise moves a good "
            f"student by {figure(data['noise'] * unit, 2)}, which intervals over seeds do not "
            "show, since all seeds are measured on one draw."
        )
    parts.append("What the teacher gives without distillation, each solver at its best start:")
    parts.append(markdown(references(scene, data)))
    parts.append(
        "Heun's method makes an odd number of calls, the most that are not above the number asked "
        "for. `undistilled` is the teacher's network sampled as a student is."
    )
    for calls in sorted({row["calls"] for row in data["rows"]}):
        word = "One call" if calls == 1 else "Four calls"
        parts.append(f"### {word}")
        parts.append(f"![{word}, by distance](images/arena-{scene}-ranks-{calls}.svg)")
        parts.append(f"![{word}, against compute](images/arena-{scene}-compute-{calls}.svg)")
        parts.append(markdown(leaders(scene, data, calls)))
        table = speeds(data, calls)
        if table.rows:
            parts.append(
                "F and CPU seconds of training until the distance is that of the teacher's best "
                "solver in 4, 8 and 35 calls, where every seed gets there:"
            )
            parts.append(markdown(table))
    if data["by_calls"]:
        parts.append("### By number of calls")
        parts.append(
            "Two and eight calls take over the settings that did best in four; without an "
            "interval it is one seed. `!` marks a student that is behind the teacher's DDIM in "
            "twice its calls. More calls cost more a step, and so a student of eight has fewer "
            "steps to learn in, from a start and at a rate that were chosen for four."
        )
        parts.append(markdown(by_calls(scene, data)))
    return "\n\n".join(parts)


def arena(summary: Row) -> str:
    """docs/arena.md."""
    spaces = []
    for name, family in SPACES.items():
        points = [
            f"lr {p.lr:g}, from {p.start:g}" + (", levels to 2.5" if p.times else "")
            for p in family.points
        ]
        mine = ", ".join(f"`{one.name}`" for one in ENTRIES if one.family == name)
        spaces.append([name, "; ".join(points), f"{family.beta:g}", mine])
    absent = [f"- `{name}` {why}." for name, why in ABSENT.items()]
    absent += [f"- `{name}` {UNMEASURED}" for name in unmeasured()]
    return template("arena.md").format(
        spaces=markdown(Table(["family", "three trials", "Adam's beta_1", "methods"], spaces)),
        absent="\n".join(absent),
        scenes="\n\n".join(of_scene(name, summary[name]) for name in NAMES if name in summary),
        unrun="\n".join(
            f"- {WHAT[name]}. **Not run yet.**" for name in NAMES if name not in summary
        ),
    )


def template(name: str) -> str:
    """The prose of a page, with fields for all that is counted or measured."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


CHOSEN = {"mixture": "a mixture in the plane", "digits": "8x8 digits"}
"""The scenes that `fewstep recipes --for` draws on, in words."""


def choices(summary: Row) -> dict[str, Any]:
    """What `fewstep recipes --for` reads: places on the leaderboards, and their mean.

    Of settings, copies of the weights and lengths those of the last scene are told.
    """
    kept = ("name", "family", "needs", "calls", "setting", "seeds", "copies")
    guided = {
        one.name: any(hasattr(one.cls, field) for field in ("guidance", "kappa"))
        for one in ENTRIES
    }
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for scene in CHOSEN:
        data = summary[scene]
        rows = [r for r in data["rows"] if r["scores"] and r["tuned"] == leaderboard.TRIALS]
        for calls in sorted({row["calls"] for row in rows}):
            mine = [row for row in rows if row["calls"] == calls]
            for place, row in enumerate(mine, 1):
                one = found.setdefault(
                    (row["name"], calls), {"places": {}, "of": {}, "distances": {}}
                )
                one["places"][scene], one["of"][scene] = place, len(mine)
                one["distances"][scene] = row["scores"][data["distance"]]["mean"]
                one["runs"] = one.get("runs", 0) + row["runs"]
                one["failed"] = one.get("failed", 0) + failed(row)
                one |= {key: row[key] for key in kept}
                one["guidance"] = guided[row["name"]]
    rows = [{**row, "place": fmean(row["places"].values())} for row in found.values()]
    return {"scenes": CHOSEN, "rows": sorted(rows, key=lambda row: (row["calls"], row["place"]))}


QUESTIONS: tuple[tuple[str, Wish], ...] = (
    ("No data, one call", Wish(1, data=False)),
    ("No data, four calls", Wish(4, data=False)),
    ("Data, one call", Wish(1)),
    ("Data, four calls", Wish(4)),
    ("A guided teacher, no data, one call", Wish(1, data=False, guidance=True)),
    ("A guided teacher, no data, four calls", Wish(4, data=False, guidance=True)),
    ("No trial that failed, four calls", Wish(4, robust=True)),
)


def words(asked: Wish) -> str:
    """A wish as it is written on the command line."""
    parts = ["data" if asked.data else "no data", f"{asked.calls} step{'s' * (asked.calls > 1)}"]
    parts += ["guidance"] * asked.guidance + ["robust"] * asked.robust
    return ", ".join(parts)


def shown(row: Row, scene: str) -> str:
    """A row's distance in a scene, and its place; a dash where it takes no part."""
    if scene not in row["places"]:
        return NONE
    return f"{figure(row['distances'][scene] * UNIT[scene])} ({row['places'][scene]})"


def choosing(table: Row) -> str:
    """docs/choosing.md."""
    parts = []
    for title, asked in QUESTIONS:
        rows = answer(asked, table).rows[:SHOWN]
        lines = [
            [
                f"`{row['name']}`",
                row["family"],
                FROM[row["needs"]],
                *(shown(row, scene) for scene in CHOSEN),
                f"{row['failed']} of {row['runs']}",
                figure(row["copies"], 2),
                f"{largest(row, 24) / 1e6:,.0f}",
            ]
            for row in rows
        ]
        heads = ["method", "family", "learns from", *CHOSEN, "failed", "weights", "24 GB"]
        parts.append(f'## {title}\n\n`fewstep recipes --for "{words(asked)}"`')
        parts.append(markdown(Table(heads, lines)))
    return template("choosing.md").format(answers="\n\n".join(parts))


def write_all() -> None:
    """Write the summary, the pages, the pictures and the table of the package."""
    summary = leaderboard.summarise()
    write_json(SUMMARY, summary)
    table = choices(read_json(SUMMARY))
    write_json(CHOICES, table)
    shown = pictures(summary)
    for name, one in shown.items():
        write(IMAGES / name, standalone(one))
    write(ROOT / "docs" / "arena.md", arena(summary))
    write(ROOT / "docs" / "choosing.md", choosing(table))
    out: Path = ROOT / "runs" / "arena" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, page(summary, (arena(summary), choosing(table)), shown))
    print(f"docs/arena.md, docs/choosing.md and {out.relative_to(ROOT)}")
