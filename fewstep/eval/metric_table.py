"""Every metric once: what it says, and which way is good.

The order is that of the report's table. Early stopping, plots and pages read this; a new metric is
an entry here and a number in the scores of a domain (`fewstep.eval.domain_scores`).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """What a metric says, in a sentence, and which way is good; "" for neither."""

    meaning: str
    better: Literal["higher", "lower", ""]


METRICS: dict[str, Metric] = {
    "precision": Metric(
        "Share of the samples that look real: they lie within the circle that reaches from some "
        "training sample to its third-nearest neighbour, in feature space.",
        "higher",
    ),
    "recall": Metric(
        "Share of the training data that is covered: it lies within such a circle around some "
        "generated sample. A model that leaves out part of the data loses it here.",
        "higher",
    ),
    "density": Metric(
        "How many circles around training samples, that reach to the fifth-nearest neighbour, a "
        "sample lies in, of the five that a real one would: above 1 where samples crowd where "
        "the data are dense.",
        "higher",
    ),
    "coverage": Metric(
        "Share of those circles that hold a generated sample: like recall, but outliers among the "
        "samples do not raise it.",
        "higher",
    ),
    "accuracy": Metric(
        "Share of the samples that a classifier reads as the label they were asked for.",
        "higher",
    ),
    "swd": Metric(
        "Sliced Wasserstein distance of the pixels to the training data: how far the two sets are "
        "apart, averaged over 256 directions.",
        "lower",
    ),
    "nn": Metric(
        "Mean distance in pixel space to the nearest training sample. Far below that of held-out "
        "data it means copies of the training set; far above, samples unlike any.",
        "",
    ),
    "calls": Metric("Network calls a picture.", "lower"),
    "ms_per_image": Metric(
        "Milliseconds a picture, on the machine that measured, in large batches.",
        "lower",
    ),
    "diversity": Metric("Mean distance of a sample to the others, in pixel space.", "higher"),
    "clip": Metric("CLIP score: how well pictures fit their prompts.", "higher"),
}
DISTANCE = Metric(
    "Fréchet distance to the training data: compares mean and covariance of features, and "
    "nothing beyond. Comparable only with itself; not an FID.",
    "lower",
)


def as_few(name: str, count: int) -> str:
    """The name of a metric of as few samples as there are held-out pictures."""
    return f"{name}_of_{count}"


def metric(name: str, distance: str = "") -> Metric:
    """The entry of `name`, which may have its group before a dot, as "quick.recall".

    distance: the name of the Frechet distance in use. An unknown metric says nothing.
    """
    last = name.rpartition(".")[2]
    if few := re.fullmatch(r"(.+)_of_(\d+)", last):
        count = f"{int(few[2]):,}"
        said = f"{few[1]} of the first {count} samples, as many as there are held-out pictures: "
        return Metric(
            f"{said}this row may be compared with real data.", metric(few[1], distance).better
        )
    return DISTANCE if last == distance else METRICS.get(last, Metric("", ""))
