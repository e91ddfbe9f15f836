"""One axes, one SVG: charts that follow the colours of the page, light or dark.

Matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables;
text stays text and takes the page's font. Nothing in the result refers to anything outside it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from fewstep.report.formatting import compact

SIZE = (4.7, 2.85)
"""Inches; at 72 units an inch, about the width of half a page in pixels."""
LEVELS = 9
INKS = ("ink", "muted", "grid", "student", "teacher", "real", "fourth")
PLACEHOLDER = {
    name: f"#0a0b{i:02x}"
    for i, name in enumerate([*INKS, *(f"level{k}" for k in range(LEVELS))], start=0xC1)
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; points that the axes cannot show are left out."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    ink: str = "student"
    dash: str = "-"
    width: float = 1.6
    opacity: float = 1.0
    marker: str = ""


@dataclass(frozen=True)
class Anchor:
    """A horizontal reference line."""

    y: float
    label: str
    ink: str
    dash: str = "--"


@dataclass(frozen=True)
class Axis:
    """The quantity on an axis, with its unit."""

    label: str
    log: bool = False
    cut: bool = False
    """Leave out the outermost per cent of the values at either end."""
    zero: bool = False
    """Begin at zero."""


@dataclass(frozen=True)
class Chart:
    """A finished chart with its title and description."""

    title: str
    svg: Markup
    caption: str = ""


def require() -> None:
    """Raise ValueError, with the remedy, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "the report draws its charts with matplotlib: pip install 'fewstep[report]'"
        ) from None


def chart(
    key: str,
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    anchors: Sequence[Anchor] = (),
    caption: str = "",
    note: str = "",
) -> Chart | None:
    """Draw; None where there is no point to show.

    key: makes the ids in the page unique; note: stands in a corner, such as "one seed".
    The last drawing of a key is remembered, and given again for the same data.
    """
    what = repr((title, series, x, y, anchors, caption, note))
    known = _REMEMBERED.get(key)
    if known is None or known[0] != what:
        drawn = _chart(key, title, series, x, y, anchors, caption, note)
        known = _REMEMBERED[key] = what, drawn
    return known[1]


_REMEMBERED: dict[str, tuple[str, Chart | None]] = {}
"""By key: what was drawn last, in words, and the drawing."""


def _chart(
    key: str,
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    anchors: Sequence[Anchor],
    caption: str,
    note: str,
) -> Chart | None:
    """The drawing of `chart`."""
    kept = [_visible(line, x, y) for line in series]
    kept = [line for line in kept if line.x]
    if not kept:
        return None
    anchors = [a for a in anchors if math.isfinite(a.y) and (a.y > 0 or not y.log)]
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_style(key)):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for i, line in enumerate(kept):
            _draw(axes, line, f"line-{i}")
        for anchor in anchors:
            ink = PLACEHOLDER[anchor.ink]
            axes.axhline(anchor.y, color=ink, ls=anchor.dash, lw=1.2, label=anchor.label)
        _scale(axes.xaxis, axes.set_xlim, axes.set_xscale, x, [v for a in kept for v in a.x])
        heights = [v for a in kept for v in a.y] + [a.y for a in anchors]
        _scale(axes.yaxis, axes.set_ylim, axes.set_yscale, y, heights)
        _legend(axes)
        if note:
            corner: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
            axes.text(1.0, 1.01, note, color=PLACEHOLDER["muted"], fontsize=7.5, **corner)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    words = f"{title}: {y.label} against {x.label}{note and f', {note}'}. {_summary(kept)}"
    svg = buffer.getvalue()
    for i, line in enumerate(kept):
        svg = _with_values(svg, f"line-{i}", line, x)
    return Chart(title, _inline(svg, key, words), caption)


def _with_values(svg: str, name: str, line: Series, x: Axis) -> str:
    """The drawing, whose marked points of one line say their values under the pointer."""
    start = svg.index(f'<g id="{name}"')
    end = svg.find('<g id="', start + 1)
    before, drawn, after = svg[:start], svg[start:end], svg[end:]
    parts = re.split(r"(<use [^>]*)/>", drawn)
    if len(parts) // 2 != len(line.x):
        return svg
    for i, (at, value) in enumerate(zip(line.x, line.y, strict=True)):
        text = f"{line.label}: " if line.label else ""
        text += f"{compact_value(value)} at {compact_value(at)} ({x.label})"
        parts[2 * i + 1] += f"><title>{escape(text)}</title></use>"
    return before + "".join(parts) + after


def _style(key: str) -> Any:
    ink, muted, grid = (PLACEHOLDER[name] for name in ("ink", "muted", "grid"))
    return {
        "svg.hashsalt": key,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "xtick.color": muted,
        "ytick.color": muted,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }


def _visible(line: Series, x: Axis, y: Axis) -> Series:
    """The points that are finite, and positive where the axis is logarithmic."""
    pairs = [
        (a, b)
        for a, b in zip(line.x, line.y, strict=True)
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x.log) and (b > 0 or not y.log)
    ]
    xs, ys = [a for a, _ in pairs], [b for _, b in pairs]
    marker = line.marker or ("o" if len(pairs) == 1 else "")
    return Series(xs, ys, line.label, line.ink, line.dash, line.width, line.opacity, marker)


def _draw(axes: Any, line: Series, name: str) -> None:
    axes.plot(
        line.x,
        line.y,
        color=PLACEHOLDER[line.ink],
        ls=line.dash or "none",
        lw=line.width,
        alpha=line.opacity,
        marker=line.marker or None,
        ms=3.5,
        label=line.label or "_",
        gid=name,
    )


def _scale(axis: Any, limits: Any, scale: Any, what: Axis, values: Sequence[float]) -> None:
    """Linear or logarithmic, with readable ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if what.cut and len(values) >= 100:
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    if what.log:
        scale("log")
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_minor_locator(NullLocator())
        margin = 10 ** max(0.05 * decades, 0.03)
        limits(low / margin, high * margin)
    else:
        constant = low == high and not what.zero  # ticks beside it would round to the same words
        axis.set_major_locator(FixedLocator([low]) if constant else MaxNLocator(6))
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        limits(0 if what.zero else low - margin, high + margin)
    axis.set_major_formatter(FuncFormatter(compact))
    axis.set_label_text(what.label)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (labels and " and " in labels[0]):
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=_columns(labels),
            fontsize=8.5,
            handlelength=2.2,
            handletextpad=0.6,
            columnspacing=1.2,
            borderpad=0.2,
        )


def _columns(labels: Sequence[str], most: float = 285.0) -> int:
    """The columns of a legend: as many as are at most so wide together, by the letters in them."""
    for count in (4, 3, 2) if len(labels) <= 4 else (3, 2):
        rows = -(-len(labels) // count)
        columns = [labels[i : i + rows] for i in range(0, len(labels), rows)]
        if sum(34 + 5.3 * max(map(len, column)) for column in columns) <= most:
            return count
    return 1


def _summary(lines: Sequence[Series]) -> str:
    """The ends of each line in words, for those who cannot see it."""
    parts = []
    for line in lines:
        if line.label:
            ends = f"from {compact_value(line.y[0])} to {compact_value(line.y[-1])}"
            parts.append(f"{line.label} {ends}" if len(line.y) > 1 else line.label)
    return "; ".join(parts) + ("." if parts else "")


def compact_value(value: float) -> str:
    """A number with three significant digits, whole ones in full."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.3g}"


def _attributes(style: re.Match[str]) -> str:
    """A style as attributes of its own, which a page may have that forbids itself styles."""
    pairs = (part.split(":", 1) for part in style[1].split(";") if ":" in part)
    return "".join(f' {name.strip()}="{value.strip()}"' for name, value in pairs)


def _inline(svg: str, key: str, words: str) -> Markup:
    """Matplotlib's file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{key}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('xlink:href="#', f'href="#{key}-')
    svg = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r'\sstyle="([^"]*)"', _attributes, svg)
    for name, placeholder in PLACEHOLDER.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    head = f'<svg class="chart" role="img" viewBox="{box[1] if box else ""}" '
    head += f'aria-label="{escape(words)}">'
    body = svg[svg.index(">") + 1 :]
    return Markup(head + re.sub(r"\n\s*", "\n", body))
