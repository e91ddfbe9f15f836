"""A run folder as one self-contained page: no network, nothing beside the file, one short script.

    write_report(Path("runs/demo")) -> runs/demo/report.html

Samples are drawn anew from the stored models; everything else is read from the folder. All text
from files is escaped, and the page forbids itself to load anything, and to run any script but its
own, which it names by its digest. `fewstep watch` serves the same page of a run that is going on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewstep.eval.metric_table import as_few
from fewstep.report import plots, reasons, sample_images, svg_chart, tables
from fewstep.report.checks import checks
from fewstep.report.formatting import about, count, duration, short
from fewstep.report.headline import headline, kept, measuring, quick
from fewstep.report.repeats import seeds, with_repeats
from fewstep.report.run_data import RunData, read_run, whole
from fewstep.report.run_progress import progress
from fewstep.report.run_warnings import run_warnings
from fewstep.report.sample_images import UNASKED, Making
from fewstep.storage.files import write
from fewstep.storage.machine_errors import trouble


def write_report(path: Path, making: Making = UNASKED, repeats: Sequence[Path] = ()) -> Path:
    """Write report.html into a run folder: one page without links to other files.

    Arguments:
        path: the run folder, finished or not.
        making: how its pictures are made.
        repeats: folders of the same run with other seeds, whose spread is shown.
    Returns the path of the page.
    Raises ValueError where `path` is no run, a file in it is damaged, a repeat is none, matplotlib
    is missing or the page cannot be written; OSError where the disk is full or the like.
    """
    svg_chart.require()
    f = with_repeats(read_run(path), repeats)
    page = render(f, making)
    out = path / "report.html"
    try:
        write(out, page)
    except OSError as error:
        if trouble(error):
            raise
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    return out


def render(f: RunData, making: Making | None = UNASKED) -> str:
    """The HTML page of one run.

    Arguments:
        f: the run.
        making: how its pictures are made; None: none are, no model is read, and the page is the
            one that `fewstep watch` serves, with its style, script and grids beside it.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    live = making is None
    samples = sample_images.sample(f, making) if making else sample_images.not_made(f)
    alarms = run_warnings(f)
    asked = checks(f, samples.diversity)
    warned = {check.name: check.warning for check in asked if check.passed is False}
    if f.finished:  # the checks judge the whole run
        alarms = [alarm for alarm in alarms if alarm.check not in warned]
    else:
        warned = {k: v for k, v in warned.items() if k not in {alarm.check for alarm in alarms}}
    context: dict[str, Any] = {
        "name": str(f.facts.get("recipe", "run")),
        "f": f,
        "headline": headline(f, asked, few := _few(f, samples), live),
        "kept": kept(f),
        "live": live,
        "progress": progress(f),
        "alarms": alarms,
        "warnings": list(warned.values()),
        "few": few,
        "sized": not math.isnan(f.score(f.role, as_few(f.distance, few))),
        "checks": asked,
        "cards": _cards(f, samples),
        "notes": samples.notes,
        "grids": sample_images.side_by_side(samples),
        "roles_shown": len(samples.calls),
        "columns": sample_images.column_labels(samples),
        "metrics": tables.metrics(f),
        "roles": tables.roles(f),
        "protocol": _protocol(f, samples),
        "seeds": seeds(f),
        "measuring": measuring(f),
        "evaluations": tables.evaluations(f),
        "film": (film := sample_images.film(f)),
        "strips": sample_images.strips(film),
        "frames": sample_images.frames(f, live),
        "downloads": tables.downloads(f),
        "quality": plots.quality(f),
        "quick": _quick(f),
        "no_quick": reasons.no_quick(f),
        "no_gauges": reasons.no_gauges(f),
        "gauges": plots.gauges(f, samples.diversity),
        "levels": tables.levels(f),
        "training": plots.training(f),
        "settings": tables.settings(f),
        "commands": tables.commands(f),
        "environment": tables.environment(f),
        "digests": tables.digests(f),
        "json": json.dumps(f.facts, indent=2, ensure_ascii=False),
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context |= {"style": Markup(asset("style.css")), "script": Markup(script), "digest": digest}
    return environment.from_string(asset("template.html")).render(context)


def asset(name: str) -> str:
    """A file of this package."""
    return (files("fewstep.report") / name).read_text(encoding="utf-8")


def _cards(f: RunData, samples: sample_images.Samples) -> list[tuple[str, str, str]]:
    """The few numbers everyone asks for: (number, what it is, beside)."""
    cards = []
    calls, teacher = f.score(f.role, "calls"), f.score("teacher", "calls")
    student = f.role == "student"
    if calls == calls:
        beside = f"teacher {teacher:,.0f}" if student and teacher == teacher else ""
        noun = "network call" if calls == 1 else "network calls"
        cards.append((f"{calls:,.0f}", f"{noun} a picture", beside))
    distance = f.score(f.role, f.distance)
    if distance == distance:
        other = f.score("teacher" if student else "real", f.distance)
        beside = f"{'teacher' if student else 'held-out data'} {short(other)}"
        cards.append((short(distance), f.distance, beside))
    elif look := quick(f.last):
        first = next(filter(None, map(quick, f.gauges)))
        beside = f"first {short(first.value)}, on {first.samples:,} samples only"
        cards.append((short(look.value), f"{look.name} at the last look", beside))
    speed, slow = f.score(f.role, "ms_per_image"), f.score("teacher", "ms_per_image")
    if speed > 0:
        beside = f"{short(slow / speed, 2)} times faster than the teacher" if student else ""
        cards.append((f"{short(speed, 2)} ms", "a picture", beside))
    if samples.size:
        cards.append((about(samples.size), "parameters", ""))
    beside = f"{f.done:,} of {f.steps:,} steps, {about(f.images)} images"
    cards.append((duration(f.seconds), "of training", beside))
    return [(_unbroken(number), what, more) for number, what, more in cards]


def _unbroken(text: str) -> str:
    """With each unit on the line of its number: "10 min" and "34 s"."""
    return re.sub(r"(?<=\d) (?=[a-z])", "\u00a0", text)


def _few(f: RunData, samples: sample_images.Samples) -> int:
    """The number of held-out samples, where the models had more; else 0."""
    held_out = len(samples.sample_metrics.held_out) if samples.sample_metrics else 0
    return held_out if held_out < whole(f.protocol, "samples") else 0


def _protocol(f: RunData, samples: sample_images.Samples) -> str:
    """How the measurements were made."""
    size, draws = (whole(f.protocol, key) for key in ("samples", "draws"))
    text = f"{count(draws, 'draw')} of {size:,} fresh samples each" if size else "Unknown draws"
    text += "; mean ± standard deviation over the draws."
    if (y := samples.sample_metrics) is not None:
        text += (
            f" Distances are to the {len(y.reference):,} training samples; the column 'real' is "
            f"the {len(y.held_out):,} held-out ones, measured once."
        )
    return text


def _quick(f: RunData) -> str:
    """Samples of a quick look, and of the anchors beside it."""
    quick = f.last.get("quick") if f.last else None
    size = whole(quick, "samples") if isinstance(quick, dict) else 0
    return f"{size:,}" if size else ""
