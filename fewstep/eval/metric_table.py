"""Every metric once: what it says, which way is good, and how it is computed.

The order is that of the report's table. Scores, early stopping, plots and pages read this; a new
metric is an entry here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from fewstep.eval.metrics import (
    density_coverage,
    frechet,
    nearest,
    precision_recall,
    sliced_wasserstein,
)
from fewstep.eval.neighbours import Reference


@dataclass(frozen=True, eq=False)
class Compared:
    """Samples beside real pictures: all that a metric may look at."""

    x: Tensor
    """(N, *) samples."""
    labels: Tensor | None
    """(N,) the classes that they were made for, or None."""
    features: Tensor
    """(N, D)"""
    predicted: Tensor
    """(N,) the classes that a classifier reads."""
    real_x: Tensor
    """(M, *) real pictures."""
    real: Reference
    """Their features."""
    k: int
    """Neighbours in precision and recall."""

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Both, of one comparison of the features."""
        return precision_recall(self.real, self.features, self.k)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        """Likewise."""
        return density_coverage(self.real, self.features)


def _accuracy(s: Compared) -> float | None:
    return None if s.labels is None else float((s.predicted == s.labels).double().mean())


class Metric(NamedTuple):
    """A metric of samples, or a number that stands beside such.

    meaning: what it says, in a sentence; better: which way is good, "" for neither; of: its value,
    or None where these samples have none; None where it is measured otherwise; sized: it depends
    on the number of samples, so that it is also given for as many as there are held-out pictures.
    """

    meaning: str
    better: Literal["higher", "lower", ""]
    of: Callable[[Compared], float | None] | None = None
    sized: bool = False


METRICS: dict[str, Metric] = {
    "precision": Metric(
        "Share of the samples that look real: they lie within the circle that reaches from some "
        "training sample to its third-nearest neighbour, in feature space.",
        "higher",
        lambda s: s.precision_recall[0],
    ),
    "recall": Metric(
        "Share of the training data that is covered: it lies within such a circle around some "
        "generated sample. A model that leaves out part of the data loses it here.",
        "higher",
        lambda s: s.precision_recall[1],
        sized=True,
    ),
    "density": Metric(
        "How many circles around training samples, that reach to the fifth-nearest neighbour, a "
        "sample lies in, of the five that a real one would: above 1 where samples crowd where "
        "the data are dense.",
        "higher",
        lambda s: s.density_coverage[0],
    ),
    "coverage": Metric(
        "Share of those circles that hold a generated sample: like recall, but outliers among the "
        "samples do not raise it.",
        "higher",
        lambda s: s.density_coverage[1],
        sized=True,
    ),
    "accuracy": Metric(
        "Share of the samples that a classifier reads as the label they were asked for.",
        "higher",
        _accuracy,
    ),
    "swd": Metric(
        "Sliced Wasserstein distance of the pixels to the training data: how far the two sets are "
        "apart, averaged over 256 directions.",
        "lower",
        lambda s: sliced_wasserstein(s.x.flatten(1), s.real_x.flatten(1)),
    ),
    "nn": Metric(
        "Mean distance in pixel space to the nearest training sample. Far below that of held-out "
        "data it means copies of the training set; far above, samples unlike any.",
        "",
        lambda s: float(nearest(s.x.flatten(1), s.real_x.flatten(1)).mean()),
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
    lambda s: frechet(s.features, s.real.features),
    sized=True,
)
"""Its name is that of its features: see `metric`."""


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


def values(compared: Compared, distance: str) -> dict[str, float]:
    """All metrics of samples by name; the Frechet distance, under the name `distance`, first."""
    found = {name: one.of(compared) for name, one in _all(distance).items() if one.of}
    return {name: value for name, value in found.items() if value is not None}


def sized(distance: str) -> list[str]:
    """The names of metrics that depend on the number of samples."""
    return [name for name, one in _all(distance).items() if one.sized]


def _all(distance: str) -> dict[str, Metric]:
    return {distance: DISTANCE, **METRICS}
