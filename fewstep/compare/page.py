"""Runs side by side as one self-contained page, in the style of a run's report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple

from fewstep.compare.table import Comparison, Entry, Group, Interval
from fewstep.eval.metric_table import metric
from fewstep.report import sample_images, svg_chart
from fewstep.report.formatting import about, count as count_of, duration, short
from fewstep.report.plots import IMAGES
from fewstep.report.run_data import number
from fewstep.report.sample_images import Making, Picture
from fewstep.report.svg_chart import Anchor, Axis, Chart, Series, chart
from fewstep.training.progress import report_progress

INKS = ("student", "real", "fourth", "level5", "level0", "ink")
DASHES = ("-", "--", "-.", ":")
"""Of the lines of groups: every ink in one dash, then every ink in the next."""
FORWARDS = Axis("forward passes of the teacher's network", log=True)
SECONDS = Axis("seconds of training", log=True)
ANCHOR = (
    "The teacher's line is of as many samples as the table's numbers; the others are of fewer."
)


class Row(NamedTuple):
    """A group in the table: name, method, seeds, then cells of (text, spread)."""

    name: str
    method: str
    seeds: str
    cells: list[tuple[str, str]]
    best: bool


class Named(NamedTuple):
    """The pictures of one run, and of its teacher before the first."""

    pictures: list[Picture]
    notes: list[str]


def render(c: Comparison, making: Making) -> str:
    """The page of a comparison."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    svg_chart.require()
    shown = pictures(c, making)
    context: dict[str, Any] = {
        "c": c,
        "title": title(c),
        "columns": columns(c),
        "rows": rows(c),
        "charts": charts(c),
        "pictures": shown.pictures,
        "notes": [*c.notes, *shown.notes],
        "differing": c.differing(),
        "differences": [
            (d.a, d.b, short(d.of.mean), span(d.of), d.of.n, d.clear) for d in c.differences()
        ],
        "better": metric(c.distance).better or "lower",
        "style": Markup(asset("fewstep.report", "style.css")),
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(asset("fewstep.compare", "template.html"))
    return template.render(context)


def asset(package: str, name: str) -> str:
    """A text file of a package."""
    return (files(package) / name).read_text(encoding="utf-8")


def title(c: Comparison) -> str:
    """What the page shows, in a line."""
    return f"{count_of(len(c.entries), 'run')} in {count_of(len(c.groups), 'setting')}"


def span(of: Interval) -> str:
    """An interval as text, "" where there is one seed."""
    return f"{short(of.low)} to {short(of.high)}" if math.isfinite(of.low) else ""


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("images", "images", about),
    ("forwards_a_step", "forwards a step", about),
    ("forwards", "forwards in all", about),
    ("seconds", "training", duration),
)
"""Field of `Entry.json`, heading, and how it is written."""


def columns(c: Comparison) -> list[str]:
    """Headings of the numbers in the table."""
    return ["calls", *c.shown, *(heading for _, heading, _ in COSTS)]


def rows(c: Comparison) -> list[Row]:
    """The teacher, then a row a group; the best distance is marked, where there are several."""
    means = {
        group.name: group.score(c.distance).mean if c.distance else math.nan for group in c.groups
    }
    known = [value for value in means.values() if math.isfinite(value)]
    lead = (max if metric(c.distance).better == "higher" else min)(known, default=math.nan)
    found = [_row(c, group, means[group.name] == lead and len(known) > 1) for group in c.groups]
    return [_teacher(c), *found] if c.teacher else found


def _teacher(c: Comparison) -> Row:
    """The teacher's scores, as they were measured beside the first run that has them."""
    scores = [c.teacher.get(name, math.nan) for name in c.shown]
    cells = [_calls(c.teacher.get("calls", math.nan)), *((short(value), "") for value in scores)]
    return Row("teacher", "", "", [*cells, *((short(math.nan), "") for _ in COSTS)], False)


def _calls(calls: float) -> tuple[str, str]:
    return (f"{calls:,.0f}" if math.isfinite(calls) else short(calls), "")


def _row(c: Comparison, group: Group, best: bool) -> Row:
    cells = [_calls(group.score("calls").mean)]
    for name in c.shown:
        of = group.score(name)
        cells.append((short(of.mean), span(of)))
    for field, _, write in COSTS:
        value = group.mean(field)
        cells.append((write(value) if math.isfinite(value) else short(value), ""))
    seeds = ", ".join(str(entry.seed) for entry in group.entries)
    return Row(group.name, group.entries[0].f.method, seeds, cells, best)


def charts(c: Comparison) -> list[Chart]:
    """Quality while training, against images, forward passes and seconds; and diversity."""
    found: list[Chart | None] = []
    if c.distance:
        log = metric(c.distance).better != "higher"
        anchors = [Anchor(c.teacher.get(c.distance, math.nan), "teacher", "teacher", "--")]
        y = Axis(f"{c.distance}, quick", log=log)
        for key, name, x, of in _against():
            lines = _lines(c, lambda e: e.quick(c.distance), of)
            title = f"{c.distance} against {name}"
            found.append(chart(key, title, lines, x, y, anchors=anchors, caption=ANCHOR))
    looks = _lines(c, lambda e: [(g, number(g, "diversity")) for g in e.f.gauges], _images)
    y = Axis("difference of two samples", zero=True)
    found.append(chart("cd", "Diversity", looks, Axis("training images seen"), y))
    return [one for one in found if one is not None]


At = Callable[[Entry, dict[str, Any]], float]


def _images(_entry: Entry, look: dict[str, Any]) -> float:
    return number(look, "images")


def _forwards(entry: Entry, look: dict[str, Any]) -> float:
    return entry.cost.at(number(look, "step"))


def _seconds(entry: Entry, look: dict[str, Any]) -> float:
    return entry.clock.get(number(look, "step"), math.nan)


def _against() -> tuple[tuple[str, str, Axis, At], ...]:
    return (
        ("ci", "images", IMAGES, _images),
        ("cf", "forward passes", FORWARDS, _forwards),
        ("cs", "time", SECONDS, _seconds),
    )


def _lines(
    c: Comparison, of: Callable[[Entry], list[tuple[dict[str, Any], float]]], at: At
) -> list[Series]:
    """A line for each run; repeats have the ink and the dash of their group, and one name."""
    lines = []
    for i, group in enumerate(c.groups):
        ink, dash = INKS[i % len(INKS)], DASHES[i // len(INKS) % len(DASHES)]
        for place, entry in enumerate(group.entries):
            looks = of(entry)
            xs, ys = [at(entry, look) for look, _ in looks], [value for _, value in looks]
            label = "" if place else group.name
            lines.append(Series(xs, ys, label, ink, dash, 1.4, 0.6 if place else 1.0, "o"))
    return lines


def pictures(c: Comparison, making: Making) -> Named:
    """The samples of a run of each group, the same noise for all, the teacher's before them."""
    out, notes = list[Picture](), dict[str, None]()
    for done, group in enumerate(c.groups):
        entry = group.entries[0]
        wanted = Making(making.device, making.teacher and not done, making.guidance)
        try:
            samples = sample_images.sample(entry.f, wanted)
        except ValueError as error:
            notes[f"{entry.name} is not shown: {error}."] = None
            continue
        notes |= dict.fromkeys(note for note in samples.notes if "Real pictures" not in note)
        for role, p in zip(_roles(samples), sample_images.side_by_side(samples), strict=True):
            if role == "teacher":
                out.append(p)
            elif role == entry.f.role:
                out.append(replace(p, title=group.name))
        report_progress("pictures", done + 1, len(c.groups))
    return Named(out, list(notes))


def _roles(samples: sample_images.Samples) -> list[str]:
    return [role for role in ("teacher", "student", "real") if role in samples.x]
