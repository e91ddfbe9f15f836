"""Numbers and metrics in words."""

from __future__ import annotations

import math

NONE, MINUS = "\u2013", "\u2212"
"""A dash for a number that is not there, and the sign of a negative one."""

BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}

METRICS: dict[str, tuple[str, str]] = {
    "precision": (
        "Share of the samples that look real: they lie within the circle that reaches from some "
        "training sample to its third-nearest neighbour, in feature space.",
        "higher",
    ),
    "recall": (
        "Share of the training data that is covered: it lies within such a circle around some "
        "generated sample. A model that leaves out part of the data loses it here.",
        "higher",
    ),
    "density": (
        "How many circles around training samples, that reach to the fifth-nearest neighbour, a "
        "sample lies in, of the five that a real one would: above 1 where samples crowd where "
        "the data are dense.",
        "higher",
    ),
    "coverage": (
        "Share of those circles that hold a generated sample: like recall, but outliers among the "
        "samples do not raise it.",
        "higher",
    ),
    "accuracy": (
        "Share of the samples that a classifier reads as the label they were asked for.",
        "higher",
    ),
    "swd": (
        "Sliced Wasserstein distance of the pixels to the training data: how far the two sets are "
        "apart, averaged over 256 directions.",
        "lower",
    ),
    "nn": (
        "Mean distance in pixel space to the nearest training sample. Far below that of held-out "
        "data it means copies of the training set; far above, samples unlike any.",
        "",
    ),
    "calls": ("Network calls a picture.", "lower"),
    "ms_per_image": (
        "Milliseconds a picture, on the machine that measured, in large batches.",
        "lower",
    ),
}
"""What each metric says, and which way is good."""


def explain(name: str, distance: str) -> tuple[str, str]:
    """(one sentence, which direction is good) for the metric `name`."""
    if name == distance:
        return (
            "Fréchet distance to the training data: compares mean and covariance of features, and "
            "nothing beyond. Comparable only with itself; not an FID.",
            "lower",
        )
    return METRICS.get(name, ("", ""))


def short(value: float, digits: int = 3) -> str:
    """A number for people: three significant digits, without an exponent where it is readable."""
    if not math.isfinite(value):
        return NONE if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.replace("-", MINUS)


def count(value: float, noun: str) -> str:
    """ "1 call", "35 calls", "76,800 images"."""
    return f"{value:,.0f} {noun}{'' if value == 1 else 's'}"


def compact(value: float, _position: object = None) -> str:
    """Tick labels: 0.01, 300, 10k, 2M."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:g}{unit}".replace("-", MINUS)
    if 0 < size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", MINUS)
    return f"{value:g}".replace("-", MINUS)


def about(value: float) -> str:
    """Three significant digits, compactly: 661k, 289k."""
    return compact(float(f"{value:.3g}"))


def duration(seconds: float) -> str:
    """ "34 s", "2 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
