"""The charts of a report: quality, gauges by noise level, training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.eval.metric_table import metric
from fewstep.report.formatting import about, short
from fewstep.report.repeats import seeds
from fewstep.report.run_data import Line, RunData, number
from fewstep.report.svg_chart import LEVELS, Anchor, Axis, Chart, Series, chart

IMAGES = Axis("training images seen", log=True)
STEPS = Axis("training step")
INKS = {"student": "student", "fake": "fourth", "denoiser": "teacher"}
TITLES = {"clip": "CLIP score (higher is better)"}
DASHES = ("-", "--", "-.", ":")
FADING = ((":", 1.2, 0.5), ("-.", 1.3, 0.65), ("--", 1.4, 0.8), ("-", 1.8, 1.0))
"""Dash, width and opacity of a line, from the distant past to now."""


def _kept(charts: Sequence[Chart | None]) -> list[Chart]:
    return [c for c in charts if c is not None]


def anchors(f: RunData, name: str) -> list[Anchor]:
    """Teacher and real data as lines, where they were measured."""
    dashes = {"teacher": "--", "real": ":"}
    return [
        Anchor(f.score(role, name), role, role, dash)
        for role, dash in dashes.items()
        if role != f.role
    ]


def quality(f: RunData) -> list[Chart]:
    """The quick scores at each look, with the anchors of metrics.json."""
    looks = [(look, look["quick"]) for look in f.gauges if isinstance(look.get("quick"), dict)]
    if not looks:
        return []
    images = [number(look, "images") for look, _ in looks]
    samples = f"{number(looks[-1][1], 'samples'):,.0f} samples"
    names = [name for name in looks[-1][1] if name != "samples"]
    distance = f.distance or names[0]
    shown = list(dict.fromkeys([distance, *(n for n in names if metric(n).better == "higher")]))
    charts = []
    for i, name in enumerate(shown):
        values = [number(quick, name) for _, quick in looks]
        lines = [Series(images, values, "quick", marker="o"), *_other_seeds(f, name)]
        final = f.score(f.role, name)
        if not math.isnan(final):
            lines.append(Series(images[-1:], [final], "measured", "fourth", "", marker="D"))
        before = f"Before training: {short(values[0])}." if images[0] == 0 else ""
        least = name == distance and metric(name).better != "higher"
        title = f"{name} (lower is better)" if least else TITLES.get(name, name.capitalize())
        axis = Axis(f"{name}, on {samples}", log=least)
        charts.append(
            chart(
                f"q{i}",
                title,
                lines,
                IMAGES,
                axis,
                anchors=anchors(f, name),
                caption=before,
                note=seeds(f),
            )
        )
    return _kept(charts)


def _other_seeds(f: RunData, name: str) -> list[Series]:
    """The quick scores of the same run with other seeds: thin lines, one of them in the legend."""
    lines = []
    for i, other in enumerate(f.repeats):
        looks = [(x, x["quick"]) for x in other.gauges if isinstance(x.get("quick"), dict)]
        xs, ys = [number(x, "images") for x, _ in looks], [number(q, name) for _, q in looks]
        label = "other seeds" if i == 0 else ""
        lines.append(Series(xs, ys, label, "muted", "-", 0.9, 0.8))
    return lines


def moments(count: int, most: int = 4) -> list[int]:
    """Up to `most` of the places 0 .. count - 1, the first and last among them, denser early."""
    if count <= most:
        return list(range(count))
    growth = (count - 1) ** (1 / (most - 1))
    places, last = [0], 0
    for i in range(1, most):
        last = max(last + 1, round(growth**i))
        places.append(min(last, count - 1))
    return sorted({*places, count - 1})


def gauges(f: RunData, diversity: Mapping[str, float]) -> list[Chart]:
    """Fisher divergence, fake score and diversity."""
    awake = [look for look in f.gauges if _fisher_total(f, look) > 0]
    return _kept(
        [
            _fisher_profile(f, awake),
            _fisher_fall(f, awake),
            _fake_error(f, awake),
            _diversity(f, diversity),
        ]
    )


def _fisher_total(f: RunData, look: Line) -> float:
    return math.fsum(x for level in f.levels(look) if (x := number(level, "fisher")) > 0)


def _at(look: Line) -> str:
    return about(number(look, "images"))


T = Axis("noise level t", log=True)


def _fisher_profile(f: RunData, looks: list[dict[str, Any]]) -> Chart | None:
    if not looks:
        return None
    lines = []
    for look, opacity, dash in ((looks[0], 0.55, "--"), (looks[-1], 1.0, "-")):
        xs, ys = ([number(x, key) for x in f.levels(look)] for key in ("t", "fisher"))
        lines.append(Series(xs, ys, _at(look), dash=dash, opacity=opacity, marker="o"))
    return chart(
        "g0",
        "Fisher divergence by noise level",
        lines,
        T,
        Axis("Fisher divergence (estimate)", log=True),
        caption="Large at low noise and small at high noise by nature: the factor is α²/σ⁴. "
        "What counts is whether a level falls. The legend counts training images seen.",
    )


def _fisher_fall(f: RunData, looks: list[dict[str, Any]]) -> Chart | None:
    lines = []
    count = len(f.levels(looks[-1])) if looks else 0
    for place in range(count):
        levels = [f.levels(look) for look in looks]
        pairs = [
            (number(look, "images"), number(level[place], "fisher"))
            for look, level in zip(looks, levels, strict=True)
            if place < len(level)
        ]
        ink = f"level{round(place * (LEVELS - 1) / max(1, count - 1))}"
        label = f"t = {short(number(levels[-1][place], 't'), 2)}"
        first = pairs[0][1]
        ys = [value / first if first > 0 else math.nan for _, value in pairs]
        lines.append(Series([x for x, _ in pairs], ys, label, ink))
    return chart(
        "g1",
        "Fisher divergence over time",
        lines,
        IMAGES,
        Axis("relative to its first estimate", log=True),
        anchors=[Anchor(1.0, "", "muted", ":")],
        caption="One line a noise level, relative to the first look at which the fake score "
        "differs from the teacher. They rise while it finds the student; then all should fall.",
    )


def _fake_error(f: RunData, looks: list[dict[str, Any]]) -> Chart | None:
    lines = []
    places = moments(len(looks))
    for i, place in enumerate(places, start=len(FADING) - len(places)):
        levels = f.levels(looks[place])
        ratios = [
            number(x, "fake_error") / e if (e := number(x, "teacher_error")) > 0 else math.nan
            for x in levels
        ]
        ts = [number(x, "t") for x in levels]
        lines.append(Series(ts, ratios, _at(looks[place]), "student", *FADING[i], marker="o"))
    return chart(
        "g2",
        "Fake score against teacher",
        lines,
        T,
        Axis("fake score's error / teacher's error"),
        anchors=[Anchor(1.0, "", "muted", ":")],
        caption="Denoising error on the student's samples. The fake score knows them, so it "
        "should be at or below 1; far above, it does not keep up. The legend counts images seen.",
    )


def _diversity(f: RunData, diversity: Mapping[str, float]) -> Chart | None:
    images = [number(look, "images") for look in f.gauges]
    values = [number(look, "diversity") for look in f.gauges]
    lines = [
        Anchor(diversity.get(role, math.nan), role, role, dash)
        for role, dash in (("teacher", "--"), ("real", ":"))
    ]
    if f.prompted:
        axis = Axis("difference of two samples", zero=True)
        what = "two samples, of whichever prompts, in units of the latents"
    else:
        axis = Axis("difference within a label", zero=True)
        what = "two pictures of the same label, in units of the pixels"
    return chart(
        "g3",
        "Diversity over time",
        [Series(images, values, f.role, marker="o")],
        Axis("training images seen"),
        axis,
        anchors=lines,
        caption=f"Mean difference between {what}. A collapsing student falls towards 0.",
        note="one seed",
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Running median over about a fifteenth of the series."""
    half = max(1, len(values) // 30)
    out = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(statistics.median(window) if window else math.nan)
    return out


def training(f: RunData) -> list[Chart]:
    """Losses, gradient norms, learning rates, skipped updates, and what else was logged."""
    steps = [number(line, "step") for line in f.log]

    def lines(suffix: str, nets: Sequence[str], raw: bool = True) -> list[Series]:
        out = []
        for net in nets:
            dash = DASHES[f.nets.index(net) % len(DASHES)]
            values = [number(line, f"{net}/{suffix}") for line in f.log]
            style: dict[str, Any] = {"ink": INKS.get(net, "real"), "dash": "-" if raw else dash}
            if raw and len(values) > 20:
                out.append(Series(steps, values, "", width=0.6, opacity=0.35, **style))
                values = smooth(values)
            out.append(Series(steps, values, net, **style))
        return out

    charts = [
        chart(f"t{i}", f"Loss of {net}", lines("loss", [net]), STEPS, Axis("loss", cut=True))
        for i, net in enumerate(f.nets)
    ]
    norms, rates = Axis("gradient norm", log=True), Axis("learning rate")
    charts.append(chart("tn", "Gradient norms", lines("grad_norm", f.nets), STEPS, norms))
    together = _same(lines("lr", f.nets, raw=False))
    charts.append(chart("tl", "Learning rates", together, STEPS, rates))
    if f.skipped:
        totals = Series(steps, [number(line, "skipped") for line in f.log])
        axis = Axis("skipped updates, in total", zero=True)
        charts.append(chart("ts", "Skipped updates", [totals], STEPS, axis))
    for i, (net, suffix) in enumerate(_others(f)):
        title = f"{net}: {suffix}"
        axis = Axis(suffix, cut=True)
        charts.append(chart(f"to{i}", title, lines(suffix, [net]), STEPS, axis))
    return _kept(charts)


def _same(lines: list[Series]) -> list[Series]:
    """One line where all are equal, named after all of them."""
    if len(lines) < 2 or any(line.y != lines[0].y for line in lines):
        return lines
    names = " and ".join(line.label for line in lines)
    return [Series(lines[0].x, lines[0].y, names, "ink")]


def _others(f: RunData) -> list[tuple[str, str]]:
    """What methods log beyond the ordinary, as (net, name)."""
    keys = dict.fromkeys(key for line in f.log for key in line if "/" in key)
    pairs = [tuple(key.split("/", 1)) for key in keys]
    return [(n, s) for n, s in pairs if n in f.nets and s not in ("loss", "grad_norm", "lr")]
