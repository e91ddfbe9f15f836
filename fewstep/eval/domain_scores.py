"""Metrics of samples over several draws, beside those of real data.

`SampleMetrics` makes a domain measurable: reference pictures, held-out pictures, and a network
that turns pictures into features and labels. Pictures are clipped to their range first, as on any
screen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.eval.metric_table import Compared, as_few, sized, values
from fewstep.eval.metrics import NEIGHBOURS
from fewstep.eval.neighbours import Reference


@dataclass(frozen=True, eq=False)
class SampleMetrics:
    """How samples of one domain are measured.

    `distance` names the Frechet distance after its features ("fd_digits"), so that a number of one
    domain is never read as another's, and none as an FID.
    """

    distance: str
    reference: Tensor
    """(N, *) training pictures: what every distance is measured to."""
    held_out: Tensor
    """(M, *) real pictures that no model saw: the first anchor."""
    held_out_labels: Tensor
    measure: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Pictures -> (features (N, D), predicted labels (N,))."""
    limit: float = 1.0
    """Samples are clipped to [-limit, limit] before anything is measured; inf for points."""
    k: int = 3
    """Neighbours in precision and recall."""

    @cached_property
    def real(self) -> Reference:
        """The features of the reference pictures, the same for all samples."""
        return Reference(self.measure(self.reference)[0], (NEIGHBOURS,))


Scores = dict[str, float]


def score(x: Tensor, labels: Tensor | None, sample_metrics: SampleMetrics) -> Scores:
    """All metrics of one set of samples.

    Arguments:
        x: (N, *) samples.
        labels: (N,) the classes they were made for, None without classes.
        sample_metrics: the references, and the features to compare in.
    Returns scores by name; "accuracy" only with labels.
    """
    x = x.clamp(-sample_metrics.limit, sample_metrics.limit)
    features, predicted = sample_metrics.measure(x)
    real = sample_metrics.reference, sample_metrics.real, sample_metrics.k
    return values(Compared(x, labels, features, predicted, *real), sample_metrics.distance)


def real_scores(sample_metrics: SampleMetrics, samples: int = 0) -> dict[str, float]:
    """Scores of the held-out pictures, as if they were samples: what to compare models with.

    Where models are given more samples than there are pictures, also under the names that the
    scores of as many of their samples have.
    """
    once = score(sample_metrics.held_out, sample_metrics.held_out_labels, sample_metrics)
    if samples > len(sample_metrics.held_out):
        once |= _as_few(once, sample_metrics)
    once |= {"calls": 0.0, "ms_per_image": 0.0}
    return summarise([once])


def _as_few(scores: Scores, sample_metrics: SampleMetrics) -> Scores:
    """The scores that depend on the number of samples, under names that tell it."""
    few = len(sample_metrics.held_out)
    return {as_few(name, few): scores[name] for name in sized(sample_metrics.distance)}


def evaluate(
    generator: Generator, sample_metrics: SampleMetrics, samples: int = 5000, draws: int = 3
) -> Iterator[dict[str, float]]:
    """Score several sets of new samples; yields the summary after each set.

    Arguments:
        generator: what is measured. Draw d uses seeds d * samples, ..., (d + 1) * samples - 1.
        sample_metrics: the references, and the features to compare in.
        samples: number of samples in a set.
        draws: number of sets.
    A set larger than the held-out pictures is also scored by as many of its first samples, since
    distances fall and coverage rises with their number: "fd_digits_of_364" may be compared with
    real pictures.

    Yields means of all scores and their deviations over the sets so far, see `summarise`; the last
    is the result. "calls" are network evaluations a sample, "ms_per_image" is wall-clock time.
    Raises ValueError where a sample is not finite.
    """
    done: list[Scores] = []
    for draw in range(draws):
        seeds = range(draw * samples, (draw + 1) * samples)
        began = time.perf_counter()
        x = generator.sample(seeds)
        elapsed = time.perf_counter() - began
        labels = None
        if generator.classes:
            labels = torch.tensor(list(seeds)) % generator.classes
        scores = score(x, labels, sample_metrics)
        if samples > (few := len(sample_metrics.held_out)):
            part = score(x[:few], None if labels is None else labels[:few], sample_metrics)
            scores |= _as_few(part, sample_metrics)
        scores |= {
            "calls": float(generator.sampler.calls),
            "ms_per_image": 1000 * elapsed / samples,
        }
        done.append(scores)
        yield summarise(done)


def summarise(draws: list[Scores]) -> dict[str, float]:
    """The mean of each score over draws, and its standard deviation as "<name>_std"."""
    out: dict[str, float] = {}
    for name in draws[0]:
        values = [scores[name] for scores in draws]
        out[name] = statistics.fmean(values)
        out[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    out["draws"] = float(len(draws))
    return out
